"""Products with matrices of codes that become values in registers; twin: kernels/w4a16.py.

Two forms, as in `skinny.py`: `fma` multiplies and adds in fp32, for the fewest rows; `dot` uses
tensor cores, codes as their left operand in x's dtype, which holds them exactly, and scales on
the sums. What is beyond both is turned into values first.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from kvrun.runtime.kernels.triton import skinny
from kvrun.runtime.kernels.triton._overlap import overlap
from kvrun.runtime.kernels.triton._w4a16 import dot, fma, values
from kvrun.runtime.kernels.w4a16 import BLOCK, WORDS, Coded

FEW = 4  # rows for which `fma` is used
MOST = 256  # rows that `linear` takes


class Form(NamedTuple):
    """How a product is cut."""

    dot: bool  # tensor cores, else multiply-add
    block_n: int  # outputs of a program
    block_w: int  # words, or bytes, of a row per turn of its loop
    warps: int
    rows: int = 1  # rows of x in a tile
    stages: int = 1  # tiles in flight, of `dot`
    splits: int = 1  # programs that share K, of `dot`


def linear(
    x: torch.Tensor,
    matrix: Coded,
    *,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As the twin. `norm` and `act` up to FEW rows; not on two streams of a device at once."""
    m, (n, k) = len(x), (len(matrix.codes), matrix.columns)
    byte = matrix.codes.dtype is not torch.int32
    form = config(m, n, k, matrix.group, byte, skinny._sm_count(x.device))
    return run(form, x, matrix, bias=bias, add=add, norm=norm, eps=eps, act=act, out=out)


def run(
    form: Form, x: torch.Tensor, matrix: Coded, *,
    bias: torch.Tensor | None = None, add: torch.Tensor | None = None,
    norm: torch.Tensor | None = None, eps: float = 0.0, act: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`linear` in a form of the caller's choice."""
    (m, n), device = (len(x), len(matrix.codes)), x.device
    if out is None:
        out = torch.empty((m, n), dtype=x.dtype, device=device)
    if not m:
        return out
    options = {
        **_options(matrix), "ROWS": form.rows, "BLOCK_N": form.block_n, "BLOCK_W": form.block_w,
        "BIAS": bias is not None, "ADD": add is not None, "num_warps": form.warps,
        **overlap(device),
    }  # fmt: skip
    stored = (matrix.codes, matrix.scale, matrix.zero, matrix.table)
    strides = (
        matrix.scale.shape[1], x.stride(0), matrix.codes.stride(0),
        0 if add is None else add.stride(0), out.stride(0),
    )  # fmt: skip
    tiles = triton.cdiv(n, form.block_n)
    if not form.dot:
        fold = 4 if matrix.codes.dtype is torch.int32 else 16
        fma[(tiles,)](
            x, *stored, bias, add, norm, out, m, n, *strides, eps,
            NORM=norm is not None, ACT=act or "", FOLD=fold, **options,
        )  # fmt: skip
        return out
    assert norm is None
    assert act is None
    span, splits = _cut(form, matrix.codes.shape[1])
    parts = counters = None
    if splits > 1:
        size = tiles * splits * (form.block_n + 1) * form.rows
        parts, counters = torch.empty(size, device=device), skinny._counters(device)
    dot[(tiles, splits, triton.cdiv(m, form.rows))](
        x, *stored, bias, add, out, parts, counters, m, n, *strides, span, splits,
        SPLIT=splits > 1, STAGES=form.stages,
        # Triton's interpreter multiplies the bits of bf16 as integers.
        WIDE=device.type == "cpu", **options,
    )  # fmt: skip
    return out


def dequantise(matrix: Coded, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """As the twin, of a matrix in the order of its columns."""
    assert matrix.order is None
    n, k = len(matrix.codes), matrix.columns
    if out is None:
        out = torch.empty((n, k), dtype=dtype, device=matrix.codes.device)
    options = _options(matrix)
    del options["PARTS"]
    block_w = 128 if options["FIELDS"] > 1 else 512
    values[(triton.cdiv(n, 8), triton.cdiv(options["WORDS"], block_w))](
        matrix.codes, matrix.scale, matrix.zero, matrix.table, out,
        n, matrix.scale.shape[1], matrix.codes.stride(0),
        BLOCK_N=8, BLOCK_W=block_w, num_warps=4, **options, **overlap(out.device),
    )  # fmt: skip
    return out


def serves(m: int, matrix: Coded) -> bool:
    """Whether `linear` takes so many rows in one go."""
    return 0 < m <= MOST


def takes_in(m: int, matrix: Coded) -> bool:
    """Whether `linear` for so many rows knows a norm and a gate."""
    return 0 < m <= FEW


@cache
def config(m: int, n: int, k: int, group: int, byte: bool, sm_count: int) -> Form:
    """How a product is cut; `byte`: codes of 8 bits."""
    if m <= FEW:
        words = k if byte else triton.cdiv(k, BLOCK) * WORDS
        # A thread loads 16 bytes of each row.
        warp = 512 if byte else 128
        warps = min(4, max(1, triton.next_power_of_2(words) // warp))
        block_n = 4
        while block_n > 1 and n < block_n * 2 * sm_count:
            block_n //= 2
        return Form(False, block_n, warp * warps, warps, rows=triton.next_power_of_2(m))
    block_w = WORDS
    if byte:
        block_w = next(size for size in (64, 32, 16) if group >= k or group % size == 0)
    rows = min(128, max(16, triton.next_power_of_2(m)))
    tiles = triton.cdiv(n, 64) * triton.cdiv(m, rows)
    turns = triton.cdiv(k, block_w if byte else BLOCK)
    splits = max(1, min(turns // 4, 4 * sm_count // tiles, 8)) if m <= rows else 1
    return Form(True, 64, block_w, 4, rows=rows, stages=4 if rows <= 64 else 3, splits=splits)


def _options(matrix: Coded) -> dict[str, Any]:
    """What a kernel is compiled for."""
    four = matrix.codes.dtype is torch.int32
    kind = "byte" if not four else "int4" if matrix.table is None else "table"
    group = min(matrix.group, matrix.columns)
    return {
        "K": matrix.columns,
        "G": group,
        "WORDS": matrix.codes.shape[1],
        "FIELDS": BLOCK // WORDS if four else 1,
        "PARTS": max(1, BLOCK // group) if four and group < matrix.columns else 1,
        "KIND": kind,
        "ZERO": matrix.zero is not None,
    }


def _cut(form: Form, words: int) -> tuple[int, int]:
    """Words of a program, and how many programs that makes."""
    span = triton.cdiv(triton.cdiv(words, form.block_w), form.splits) * form.block_w
    return span, triton.cdiv(words, span)
