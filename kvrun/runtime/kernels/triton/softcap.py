"""Bent logits in Triton: one pass, where four operators would each read and write fp32."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from kvrun.runtime.kernels.triton._overlap import overlap, release, wait

_BLOCK = 2048
# Triton's interpreter does not know libdevice.
_LIBDEVICE = tl.constexpr(not triton.knobs.runtime.interpret)


def softcap(x: torch.Tensor, cap: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    rows, vocab = x.shape
    if out is None:
        out = torch.empty((rows, vocab), device=x.device)
    chunks = triton.cdiv(vocab, _BLOCK)
    _softcap[(rows * chunks,)](
        x, out, x.stride(0), out.stride(0), cap,
        VOCAB=vocab, BLOCK=_BLOCK, num_warps=8, **overlap(x.device),
    )  # fmt: skip
    return out


@triton.jit
def _softcap(
    x_at, out_at, x_stride, out_stride, cap,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    chunks: tl.constexpr = (VOCAB + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // chunks).to(tl.int64)
    columns = tl.program_id(0) % chunks * BLOCK + tl.arange(0, BLOCK)
    inside = columns < VOCAB
    wait(PDL)
    x = tl.load(x_at + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    release(PDL)
    tl.store(out_at + row * out_stride + columns, bent(x, cap), mask=inside)


@triton.jit
def bent(x, cap):
    """c·tanh(x / c) of fp32."""
    x = tl.div_rn(x, cap)
    if _LIBDEVICE:
        return libdevice.tanh(x) * cap
    return (2.0 * tl.sigmoid(2.0 * x.to(tl.float64)) - 1.0).to(tl.float32) * cap
