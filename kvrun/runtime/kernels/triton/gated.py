"""The activation of a gated MLP in Triton."""

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._overlap import overlap, release, wait


def gated(both: torch.Tensor, act: str, *, out: torch.Tensor | None = None) -> torch.Tensor:
    tokens, width = both.shape
    inner = width // 2
    if out is None:
        out = torch.empty((tokens, inner), dtype=both.dtype, device=both.device)
    block, warps = shape(tokens, inner)
    _gated[(tokens * triton.cdiv(inner, block),)](
        both,
        out,
        both.stride(0),
        out.stride(0),
        INNER=inner,
        ACT=act,
        BLOCK=block,
        num_warps=warps,
        **overlap(both.device),
    )
    return out


def shape(tokens: int, inner: int) -> tuple[int, int]:
    """Columns of a program, and its warps: 16 bytes a thread for few rows."""
    block = min(triton.next_power_of_2(inner), 1024 if tokens <= 256 else 2048)
    return block, max(1, min(4, block // 256))


@triton.jit
def _gated(
    both_at,
    out_at,
    both_stride,
    out_stride,
    INNER: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    parts: tl.constexpr = (INNER + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // parts).to(tl.int64)
    columns = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    inside = columns < INNER
    both_at += row * both_stride + columns
    wait(PDL)
    gate = tl.load(both_at, mask=inside, other=0.0)
    up = tl.load(both_at + INNER, mask=inside, other=0.0)
    release(PDL)
    tl.store(out_at + row * out_stride + columns, _gates(gate, up, ACT), mask=inside)


@triton.jit
def _gates(gate, up, ACT: tl.constexpr):
    """act(gate) · up, rounded as in the twin."""
    y = _act(gate.to(tl.float32), ACT).to(gate.dtype)
    return (y.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)


@triton.jit
def _act(x, ACT: tl.constexpr):
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        # 0.5 · (1 + tanh(u)) is sigmoid(2u); 2 · sqrt(2 / π) = 1.5957...
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(ACT == "relu", "an activation that is not known")
        y = tl.where(x < 0.0, 0.0, x)
    return y
