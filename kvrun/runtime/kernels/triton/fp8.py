"""Rows in 8 bits, one program for each; twin: kernels/fp8.py."""

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.fp8 import LARGEST, LEAST
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait
from kvrun.runtime.kernels.triton.gated import _gates


@triton.jit(do_not_specialize=["eps"])
def _rows(
    x, norm, codes, scales, stride, eps,
    K: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr,
    LARGEST: tl.constexpr, LEAST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    if NORM:
        weight = tl.load(norm + k, mask=k < K, other=0.0)
    wait(PDL)
    x += row * stride + k
    values = tl.load(x, mask=k < K, other=0.0)
    if ACT != "":
        values = _gates(values, tl.load(x + K, mask=k < K, other=0.0), ACT)
    dtype = values.dtype
    values = values.to(tl.float32)
    if NORM:
        values *= tl.rsqrt(tl.sum(values * values, 0) / K + eps) * weight
        values = values.to(dtype).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / LARGEST, LEAST)
    values = tl.clamp(values / scale, -LARGEST, LARGEST)
    tl.store(codes + row * K + k, values.to(codes.dtype.element_ty), mask=k < K)
    tl.store(scales + row, scale)


def quantise_rows(
    x: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin."""
    m, k = len(x), x.shape[1] // (1 if act is None else 2)
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m:
        block = triton.next_power_of_2(k)
        _rows[(m,)](
            x, norm, codes, scales, x.stride(0), eps, K=k, BLOCK=block, NORM=norm is not None,
            ACT=act or "", LARGEST=LARGEST, LEAST=LEAST, num_warps=warps(m, block),
            **overlap(x.device),
        )  # fmt: skip
    return codes, scales


def warps(rows: int, block: int) -> int:
    """Of a program: more where there are few rows, as for a norm."""
    return min(16, max(1, block // (256 if rows <= 256 else 1024)))
