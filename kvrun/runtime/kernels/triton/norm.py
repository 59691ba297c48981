"""RMSNorm of rows in Triton: a program holds whole rows in registers and reads them once."""

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._overlap import overlap, release, wait


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, weight, eps, x, out, before=False, after=False)
    return out


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, weight, eps, residual, out, before=True, after=False)
    return out


def norm_add(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor
) -> torch.Tensor:
    _launch(x, weight, eps, residual, residual, before=False, after=True)
    return residual


def norm_add_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    next_weight: torch.Tensor,
    next_eps: float,
) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, weight, eps, residual, out, next_weight, next_eps, before=False, after=True)
    return out


def shape(tokens: int, size: int) -> tuple[int, int]:
    """Rows of a program, and its warps."""
    if size <= 1024:
        return (4, 4) if tokens >= 2048 else (1, 4)
    return 1, min(16, triton.next_power_of_2(size) // (256 if tokens <= 256 else 512))


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor,
    out: torch.Tensor,
    next_weight: torch.Tensor | None = None,
    next_eps: float = 0.0,
    *,
    before: bool,
    after: bool,
) -> None:
    tokens, size = x.shape
    rows, warps = shape(tokens, size)
    _norm[(triton.cdiv(tokens, rows),)](
        x,
        weight,
        residual,
        out,
        next_weight,
        tokens,
        x.stride(0),
        residual.stride(0),
        out.stride(0),
        eps,
        next_eps,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        ROWS=rows,
        BEFORE=before,
        AFTER=after,
        NEXT=next_weight is not None,
        num_warps=warps,
        **overlap(x.device),
    )


@triton.jit(do_not_specialize=["tokens", "eps", "next_eps"])
def _norm(
    x_at,
    weight_at,
    residual_at,
    out_at,
    next_weight_at,
    tokens,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    next_eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BEFORE: tl.constexpr,  # the residual is added to x, and the sum kept, before the norm
    AFTER: tl.constexpr,  # the norm is added to the residual
    NEXT: tl.constexpr,  # that sum is kept too, and a second norm of it given out
    PDL: tl.constexpr,
):
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    inside = (rows < tokens) & (columns < SIZE)
    weight = tl.load(weight_at + columns, mask=columns < SIZE, other=0.0)
    if NEXT:
        next_weight = tl.load(next_weight_at + columns, mask=columns < SIZE, other=0.0)
    wait(PDL)
    x = tl.load(x_at + rows * x_stride + columns, mask=inside, other=0.0)
    dtype = x.dtype
    if BEFORE or AFTER:
        residual_at += rows * residual_stride + columns
        residual = tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
    release(PDL)
    wide = x.to(tl.float32)
    if BEFORE:
        total = (wide + residual).to(dtype)
        tl.store(residual_at, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + eps)
    y = (wide * scale[:, None] * weight).to(dtype)
    if AFTER:
        y = (residual + y.to(tl.float32)).to(dtype)
    if NEXT:
        tl.store(residual_at, y, mask=inside)
        wide = y.to(tl.float32)
        scale = tl.rsqrt(tl.sum(wide * wide, 1) / SIZE + next_eps)
        y = (wide * scale[:, None] * next_weight).to(dtype)
    tl.store(out_at + rows * out_stride + columns, y, mask=inside)
