"""RMSNorm of rows, alone or together with the addition to the residual stream beside it."""

import torch


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) · weight, in fp32, rounded once to x's dtype.

    x: [tokens, size], each row dense; weight: [size] fp32. `out` may be x itself.
    """
    wide = x.float()
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    return y if out is None else out.copy_(y)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """residual += x, in place and rounded to its dtype; returns the norm of that sum.

    x, residual: [tokens, size] of one dtype, each row dense; weight: [size] fp32. `out` may be x.
    """
    return rms_norm(residual.add_(x), weight, eps, out=out)


def norm_add(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor
) -> torch.Tensor:
    """residual += rms_norm(x), in place, both rounded to their dtype; returns residual.

    x, residual: [tokens, size] of one dtype, each row dense; weight: [size] fp32.
    """
    return residual.add_(rms_norm(x, weight, eps))


def norm_add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    next_weight: torch.Tensor,
    next_eps: float,
) -> torch.Tensor:
    """residual += rms_norm(x), in place, both rounded to their dtype; returns the next norm, of
    that sum, rounded once more.

    x, residual: [tokens, size] of one dtype, each row dense; both weights: [size] fp32.
    """
    return rms_norm(norm_add(x, weight, eps, residual), next_weight, next_eps)
