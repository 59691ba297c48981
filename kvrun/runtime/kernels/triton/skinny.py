"""Products of few rows that stream the weights at the memory's speed; twin: kernels/skinny.py.

Two forms. `fma` multiplies and adds in registers: for the fewest rows, and for fp32. `dot` uses
tensor cores, the weights as their left operand, and may cut K among programs; the last program to
arrive adds the parts in their order, so that equal inputs give equal bits. Both ask for their
first weights, which nobody writes, before they wait for the kernel in front of them.

A norm is applied as (W · (x · norm)) / rms(x): one pass over x finds both factors.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from kvrun.runtime.kernels.triton._device import shared_memory, sm_count
from kvrun.runtime.kernels.triton._overlap import overlap
from kvrun.runtime.kernels.triton._skinny import dot, fma

_LARGE = 1 << 22  # elements of a matrix, beyond which 17 to 64 rows are multiplied here
_HEAD = 1 << 17  # and rows of it, from which on it is a head of a size that was not tried
_COUNTERS = 1 << 14  # tiles of a product whose K is cut, at most


class Form(NamedTuple):
    """How a product is cut: see `config`."""

    dot: bool  # tensor cores, else multiply-add
    block_n: int  # outputs of a program
    block_k: int  # columns per turn of its loop
    warps: int
    stages: int  # weight tiles in flight
    splits: int = 1  # programs that share K, of `dot`
    ahead: int = 0  # columns of its weights that a program asks into L2 before it waits
    early: bool = True  # the next kernel may start as soon as all programs of this one have


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
    gated: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As the twin. Up to 64 rows; not on two streams of a device at once (they share counters)."""
    device = x.device
    form = config(
        x.shape[0], *weight.shape, x.dtype, sm_count(device), shared_memory(device)
    )  # fmt: skip
    given: Any = {"norm": norm, "eps": eps, "act": act, "gated": gated}
    return run(form, x, weight, bias=bias, add=add, out=out, **given)


def run(
    form: Form, x: torch.Tensor, weight: torch.Tensor, *,
    bias: torch.Tensor | None = None, add: torch.Tensor | None = None,
    norm: torch.Tensor | None = None, eps: float = 0.0, act: str | None = None,
    gated: str | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`linear` in a form of the caller's choice."""
    assert norm is None or act is None
    (m, (n, k)), device = (x.shape[0], weight.shape), x.device
    if gated is not None:
        assert bias is None
        assert add is None
        form = form._replace(block_n=max(2, form.block_n))  # a gate and its up at least
    if out is None:
        out = torch.empty((m, n // 2 if gated else n), dtype=x.dtype, device=device)
    if not m:
        return out
    assert x.stride(1) == weight.stride(1) == out.stride(1) == 1, "rows must be dense"
    options = {
        "K": k, "ROWS": _rows(m, form.dot), "BLOCK_N": form.block_n, "BLOCK_K": form.block_k,
        "NORM": norm is not None, "ACT": act or "",
        "BIAS": bias is not None, "ADD": add is not None,
        "AHEAD": _ahead(form, weight), "EARLY": form.early, "GATED": gated or "",
        "THREADS": 32 * form.warps, "num_warps": form.warps, "STAGES": form.stages,
        **overlap(device),
    }  # fmt: skip
    strides = (x.stride(0), weight.stride(0), 0 if add is None else add.stride(0), out.stride(0))
    tiles = triton.cdiv(n, form.block_n)
    if not form.dot:
        odd = (k | weight.stride(0)) % 2 or weight.data_ptr() % 4
        packed = x.element_size() == 2 and not odd
        fma[(tiles,)](
            x, weight, bias, add, norm, out, m, n, *strides, eps, PACKED=packed, **options
        )
        return out
    span, splits = _cut(form, k)
    parts = counters = None
    if splits > 1:
        size = tiles * splits * (form.block_n + 1) * options["ROWS"]
        parts, counters = torch.empty(size, device=device), _counters(device)
    dot[(tiles, splits)](
        x, weight, bias, add, norm, out, parts, counters, m, n, *strides, eps, span, splits,
        # Triton's interpreter multiplies the bits of bf16 as integers.
        SPLIT=splits > 1, WIDE=device.type == "cpu", **options,
    )  # fmt: skip
    return out


def takes_in(m: int, dtype: torch.dtype) -> bool:
    """Whether `linear` with `norm` or `act` is faster for m rows than torch's own product behind
    them."""
    # Measured against cuBLAS on an H100 with a layer's products in a row: 1.2x (8B) and 1.9x
    # (0.6B) at 1 row, 1.1x and 1.3x at 16.
    return 0 < m <= (8 if dtype is torch.float32 else 16)


def serves(m: int, weight: torch.Tensor) -> bool:
    """Whether `linear` is faster for m rows than torch's own product."""
    (n, k), dtype = weight.shape, weight.dtype
    if takes_in(m, dtype):
        return True
    # On an H100 a step of 32 and 64 rows went from 7.13 and 7.83 ms to 6.75 and 7.54 (8B), of 64
    # from 4.15 to about 4.10 (Gemma 2 2B): no product is much faster, but none waits for its
    # launch. Matrices as small as qkv, o and down of 0.6B are too much slower for that.
    large = n * k > _LARGE and n < _HEAD
    return 16 < m <= 64 and dtype is not torch.float32 and large and overlap(weight.device)["PDL"]


@cache
def config(m: int, n: int, k: int, dtype: torch.dtype, sm_count: int, room: int) -> Form:
    """The form that was fastest on a device of this kind, or the nearest to it; `room`: bytes of
    its shared memory."""
    wide = dtype is torch.float32
    if m <= (8 if wide else 4):
        warps = min(4, max(1, triton.next_power_of_2(k) // 256))
        block_n = 4
        while block_n > 1 and n < block_n * 2 * sm_count:
            block_n //= 2
        # A large product has other programs to wait beside; a small one carries its next tile.
        # Asking for weights ahead of time costs more than it brings: 1.3x of the whole chain.
        return Form(False, block_n, 256 * warps, warps, int(n * k > 1 << 25), ahead=0)
    if wide:
        return Form(True, 32, 32, 4, 2)
    block_k = 128 if k >= 128 else max(16, triton.next_power_of_2(k))
    tiles, programs, stages = triton.cdiv(n, 64), 4 * sm_count, 4
    if m > 32:
        # Three stages leave room for two programs of a multiprocessor.
        programs, stages = sm_count, 4 if tiles <= sm_count and room >= 128 << 10 else 3
    elif m > 16:
        programs = 2 * sm_count if 3 * tiles < 2 * sm_count else tiles
    splits = max(1, min(k // (2 * block_k), programs // tiles, 8))
    return Form(True, 64, block_k, 4, stages, splits=splits, ahead=2 * block_k)


def _rows(m: int, dot: bool) -> int:
    """Rows of x in a tile. Tensor cores take them by 8, but 8 are slower than 16 half empty."""
    return max(16 if dot else 1, triton.next_power_of_2(m))


def _cut(form: Form, k: int) -> tuple[int, int]:
    """Columns of a program, and how many programs that makes."""
    span = triton.cdiv(triton.cdiv(k, form.block_k), form.splits) * form.block_k
    return span, triton.cdiv(k, span)


def _ahead(form: Form, weight: torch.Tensor) -> int:
    """Columns to ask for early: whole pieces of 16 bytes, inside the part of any program."""
    k, size = weight.shape[1], weight.element_size()
    span, splits = _cut(form, k) if form.dot else (k, 1)
    odd = (k * size | weight.stride(0) * size | weight.data_ptr()) % 16
    return 0 if odd else min(form.ahead, k - (splits - 1) * span)


@cache
def _counters(device: torch.device) -> torch.Tensor:
    return torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
