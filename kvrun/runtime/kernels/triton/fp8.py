"""Rows in 8 bits, one program for each; twin: kernels/fp8.py."""

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.fp8 import LARGEST, LEAST
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait


@triton.jit
def _rows(
    x, codes, scales, stride,
    K: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    release(PDL)
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    wait(PDL)
    values = tl.load(x + row * stride + k, mask=k < K, other=0.0).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(values), 0) / LARGEST, LEAST)
    values = tl.clamp(values / scale, -LARGEST, LARGEST)
    tl.store(codes + row * K + k, values.to(codes.dtype.element_ty), mask=k < K)
    tl.store(scales + row, scale)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As the twin."""
    m, k = x.shape
    codes = torch.empty((m, k), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m:
        block = triton.next_power_of_2(k)
        _rows[(m,)](
            x, codes, scales, x.stride(0), K=k, BLOCK=block, LARGEST=LARGEST, LEAST=LEAST,
            num_warps=min(16, max(1, block // 1024)), **overlap(x.device),
        )  # fmt: skip
    return codes, scales
