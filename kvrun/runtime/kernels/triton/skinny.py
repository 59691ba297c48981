"""Products of few rows that stream the weights at the memory's speed; twin: kernels/skinny.py.

Two forms. `fma` multiplies and adds in registers: for the fewest rows, and for fp32. `dot` uses
tensor cores, the weights as their left operand, and may cut K among programs; the last program to
arrive adds the parts in their order, so that equal inputs give equal bits. Both ask for their
first weights, which nobody writes, before they wait for the kernel in front of them.

A norm is applied as (W · (x · norm)) / rms(x): one pass over x finds both factors.
"""

from functools import cache
from typing import Any

import torch
import triton

from kvrun.runtime.kernels.triton._device import shared_memory, sm_count
from kvrun.runtime.kernels.triton._overlap import overlap
from kvrun.runtime.kernels.triton._skinny import dot, fma
from kvrun.runtime.kernels.triton._skinny_forms import Form, config

_HEAD = 1 << 17  # rows of a matrix, from which on it is a head; of these 16 rows are the most
_COUNTERS = 1 << 14  # tiles of a product whose K is cut, at most


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
        x.shape[0], *weight.shape, x.dtype, sm_count(device), shared_memory(device),
        overlap=overlap(device)["PDL"],
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
    n, dtype = len(weight), weight.dtype
    if takes_in(m, dtype):
        return True
    # No product is much faster alone, but none waits for its launch.
    few = m <= 64 and dtype is not torch.float32 and n < _HEAD
    return m > 16 and few and bool(overlap(weight.device)["PDL"])


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
