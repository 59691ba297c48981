"""Codes for a matrix that has seen text: GPTQ's and AWQ's ways to round.

Sources: Frantar et al. 2022 (GPTQ), Lin et al. 2023 (AWQ). Errors are those of the products of the
calibration text, tr(D H Dᵀ) for a change D of the matrix and H = xᵀx.
"""

from collections.abc import Sequence

import torch

from kvrun.runtime.quant._round import Codes, whole

DAMPING = 0.01  # of the mean of H's diagonal
_COLUMNS = 128  # that are solved before the rest of the matrix hears of it
_STEPS = 20  # of AWQ's exponent


def damped(hessian: torch.Tensor, rows: int) -> torch.Tensor:
    """H for one row, made safe to invert; columns that nothing has been seen of count a little."""
    mean = hessian / max(rows, 1)
    floor = mean.diagonal().mean().clamp(min=1e-8) * DAMPING
    return mean + floor * torch.eye(len(mean), device=mean.device)


def gptq(
    weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int, dtype: torch.dtype
) -> Codes:
    """Columns are rounded one by one, those that matter most first; what is lost by one is made
    up for by the columns that are still to come.

    `weight` fp32 [N, K], `hessian` [K, K] as `damped` gives it. Scales, of `dtype`, are those of
    plain rounding with errors weighed by H's diagonal, and stay as they are.
    """
    weigh = hessian.diagonal()
    found = whole(weight, bits, group, symmetric=True, importance=weigh, dtype=dtype)
    order = torch.argsort(hessian.diagonal(), descending=True)
    places = order // group
    scale, zero, top = found.scale.float(), 1 << (bits - 1), (1 << bits) - 1
    inverse = _inverse(hessian[order][:, order])
    rest = weight[:, order].clone()
    codes = torch.empty_like(rest, dtype=torch.uint8)
    for start in range(0, rest.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, rest.shape[1])
        block, errors = rest[:, start:stop], torch.empty_like(rest[:, start:stop])
        part = inverse[start:stop, start:stop]
        for i in range(stop - start):
            s, column = scale[:, places[start + i]], block[:, i]
            code = ((column / s).round() + zero).clamp(0, top)
            codes[:, start + i] = code.to(torch.uint8)
            error = (column - (code - zero) * s) / part[i, i]
            block[:, i + 1 :] -= error[:, None] * part[i, i + 1 :]
            errors[:, i] = error
        rest[:, stop:] -= errors @ inverse[start:stop, stop:]
    return found._replace(codes=codes[:, torch.argsort(order)].contiguous())


def _inverse(hessian: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H's inverse."""
    for power in range(6):
        extra = hessian.diagonal().mean() * DAMPING * (10**power - 1)
        lower, failed = torch.linalg.cholesky_ex(
            hessian + extra * torch.eye(len(hessian)).to(hessian)
        )
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return torch.as_tensor(upper)
    return torch.eye(len(hessian), device=hessian.device)  # then every column stands for itself


def scales(
    weights: Sequence[torch.Tensor], hessian: torch.Tensor, bits: int, group: int
) -> torch.Tensor:
    """AWQ's factors [K] for the columns of matrices that share their input.

    Columns that see large values are made larger before they are rounded, and what they see
    smaller, by the power of its size that costs the products least.
    """
    size = hessian.diagonal().sqrt()
    best, least = torch.ones_like(size), float("inf")
    for step in range(_STEPS):
        factor = size.pow(step / _STEPS).clamp(min=1e-4)
        factor = factor / (factor.max() * factor.min()).sqrt()
        lost = sum(
            _lost(weight, _rounded(weight * factor, bits, group) / factor, hessian)
            for weight in weights
        )
        if lost < least:
            best, least = factor, lost
    return best


def _rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    return whole(weight, bits, group, symmetric=True, clip=False).values()


def _lost(weight: torch.Tensor, other: torch.Tensor, hessian: torch.Tensor) -> float:
    change = other - weight
    return float(((change @ hessian) * change).sum())
