"""Products with matrices of codes that become values in registers; twin: kernels/w4a16.py.

Two forms, as in `skinny.py`: `fma` multiplies and adds in fp32, for the fewest rows; `dot` uses
tensor cores, their left operand values that are rounded once to x's dtype. What is beyond both is
turned into values first. Of both there is another form for a single row of x and 4 bits: `one_row`
and `row_dot`.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton

from kvrun.runtime.kernels.triton import gated as gated_kernel
from kvrun.runtime.kernels.triton import skinny
from kvrun.runtime.kernels.triton._device import shared_memory, sm_count
from kvrun.runtime.kernels.triton._one_row import one_row
from kvrun.runtime.kernels.triton._overlap import overlap
from kvrun.runtime.kernels.triton._row_dot import row_dot
from kvrun.runtime.kernels.triton._w4a16 import dot, fma, values
from kvrun.runtime.kernels.w4a16 import WORDS, Coded, block

FEW = 4  # rows up to which `fma` may be used
# Rows that `linear` takes: beyond, making the values first is faster.
MOST = {4: 256, 8: 512}
_ONE_ROW = ("K", "G", "WORDS", "ZERO", "BIAS", "ADD", "num_warps")
_LONG = 1024  # words of a row of 4 bits beyond which it is cut in another way
_SHORT = 4096  # columns up to which many rows of x are cut in another way


class Form(NamedTuple):
    """How a product is cut."""

    dot: bool  # tensor cores, else multiply-add
    block_n: int  # outputs of a program
    warps: int
    block_w: int = WORDS  # words of a row per turn of its loop, of `fma`; of `row_dot` all
    rows: int = 1  # rows of x in a tile
    stages: int = 1  # tiles in flight, of `dot`; of `row_dot` all but the first in L2
    splits: int = 1  # programs that share K, of `dot`
    turning: int = 0  # programs that turn to one tile after another with the only row of x
    registers: int | None = None  # of a thread, at most; fewer let more programs run at once
    joined: bool = False  # all fields of a word are one product of `dot`, where they can be


def linear(
    x: torch.Tensor,
    matrix: Coded,
    *,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
    gated: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As the twin. `norm` and `act` up to FEW rows; not on two streams of a device at once."""
    n, k = len(matrix.codes), matrix.columns
    on_cores = _by_cores(x, norm is not None)
    if len(x) == 1 and act is None and _turns(matrix, on_cores):
        form = _turning(n, _words(matrix).shape[1], sm_count(x.device), on_cores)
    else:
        form = config(len(x), n, k, _kind(matrix), sm_count(x.device))
        form = fitting(form, matrix.bits, _wide(matrix), shared_memory(x.device))
    given: Any = {"bias": bias, "add": add, "norm": norm, "eps": eps, "act": act}
    if gated is not None and form.dot != bool(form.turning):  # neither `fma` nor `row_dot`
        return gated_kernel.gated(run(form, x, matrix, **given), gated, out=out)
    return run(form, x, matrix, gated=gated, out=out, **given)


def run(
    form: Form, x: torch.Tensor, matrix: Coded, *,
    bias: torch.Tensor | None = None, add: torch.Tensor | None = None,
    norm: torch.Tensor | None = None, eps: float = 0.0, act: str | None = None,
    gated: str | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`linear` in a form of the caller's choice; `gated` where that is `fma`'s or `row_dot`'s."""
    (m, n), device = (len(x), len(matrix.codes)), x.device
    if gated is not None:
        form = form._replace(block_n=max(2, form.block_n))  # a gate and its up at least
    if out is None:
        out = torch.empty((m, n // 2 if gated else n), dtype=x.dtype, device=device)
    if not m:
        return out
    assert x.stride(1) == out.stride(1) == 1, "rows must be dense"
    options = {
        **_options(matrix), "ROWS": form.rows, "BLOCK_N": form.block_n,
        "BIAS": bias is not None, "ADD": add is not None, "PARTS": _parts(matrix),
        "num_warps": form.warps, "maxnreg": form.registers, **overlap(device),
    }  # fmt: skip
    words = _words(matrix)
    stored = (words, matrix.scale, matrix.zero, matrix.table)
    strides = (
        matrix.scale.stride(0), x.stride(0), words.stride(0),
        0 if add is None else add.stride(0), out.stride(0),
    )  # fmt: skip
    tiles = triton.cdiv(n, form.block_n)
    if form.turning:
        assert m == 1 and act is None  # noqa: PT018
        options = {key: options[key] for key in _ONE_ROW}
        _turn(form, options, x, matrix, bias, add, norm, eps, gated, out)
        return out
    if not form.dot:
        fma[(tiles,)](
            x, *stored, bias, add, norm, out, m, n, *strides, eps,
            NORM=norm is not None, ACT=act or "", GATED=gated or "", BLOCK_W=form.block_w,
            ASM=device.type == "cuda", **options,
        )  # fmt: skip
        return out
    assert (norm, act, gated) == (None, None, None)
    m_tiles = triton.cdiv(m, form.rows)
    span, splits = _cut(form, words.shape[1])
    parts = counters = None
    if splits > 1:
        size = tiles * m_tiles * splits * (form.block_n + 1) * form.rows
        parts, counters = torch.empty(size, device=device), skinny._counters(device)
    dot[(tiles * m_tiles, splits)](
        x, *stored, bias, add, out, parts, counters, m, n, *strides, span, splits,
        SPLIT=splits > 1, STAGES=form.stages, JOINED=form.joined and _joins(x.dtype, matrix),
        ASM=x.element_size() == 2 and _hopper(device),
        # Triton's interpreter multiplies the bits of bf16 as integers.
        WIDE=device.type == "cpu", **options,
    )  # fmt: skip
    return out


def _turn(
    form: Form, options: dict[str, Any], x: torch.Tensor, matrix: Coded,
    bias: torch.Tensor | None, add: torch.Tensor | None, norm: torch.Tensor | None, eps: float,
    gated: str | None, out: torch.Tensor,
) -> None:  # fmt: skip
    """`run` by programs that turn to one tile after another."""
    words, (n, groups) = _words(matrix), (len(matrix.codes), matrix.scale.stride(0))
    if options["ZERO"]:  # they are pairs
        groups //= 2
    if form.dot:
        options |= {
            "WARPS": form.warps, "AHEAD": 0 if gated else form.stages - 1, "GATED": gated or "",
            "maxnreg": form.registers,
        }  # fmt: skip
    else:
        assert gated is None
        options |= {"BLOCK_N": form.block_n}
    tiles = triton.cdiv(n, form.block_n)
    (row_dot if form.dot else one_row)[(min(tiles, form.turning),)](
        x, words, matrix.scale, bias, add, norm, out, n, groups, words.stride(0), eps, tiles,
        NORM=norm is not None, BLOCK_W=form.block_w, ASM=x.device.type == "cuda",
        **options, **overlap(x.device),
    )  # fmt: skip


def dequantise(matrix: Coded, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """As the twin, of a matrix in the order of its columns."""
    n, k = len(matrix.codes), matrix.columns
    if out is None:
        out = torch.empty((n, k), dtype=dtype, device=matrix.codes.device)
    return _dequantise(matrix, None, out)


def rows(matrix: Coded, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As the twin, of a matrix in the order of its columns."""
    out = torch.empty((len(ids), matrix.columns), dtype=dtype, device=matrix.codes.device)
    return _dequantise(matrix, ids, out)


def _dequantise(matrix: Coded, ids: torch.Tensor | None, out: torch.Tensor) -> torch.Tensor:
    assert matrix.order is None
    options, words, n = _options(matrix), _words(matrix), len(out)
    values[(triton.cdiv(n, 32), triton.cdiv(words.shape[1], WORDS))](
        words, matrix.scale, matrix.zero, matrix.table, ids, out,
        n, matrix.scale.stride(0), words.stride(0),
        CHOSEN=ids is not None, BLOCK_N=32, num_warps=4, **options, **overlap(out.device),
    )  # fmt: skip
    return out


def serves(m: int, matrix: Coded) -> bool:
    """Whether `linear` takes so many rows in one go."""
    return 0 < m <= (MOST[matrix.bits] if matrix.table is None else FEW)


def takes_in(m: int, matrix: Coded) -> bool:
    """Whether `linear` for so many rows knows a norm and a gate, and is the place for them."""
    kind, words = _kind(matrix), _words(matrix).shape[-1]
    # Programs of long rows of 4 bits have few rows, and each computes all gates: 8 µs of 23.
    return 0 < m <= _few(kind) and not (kind == "int4" and words > _LONG)


def gates(m: int, matrix: Coded) -> bool:
    """Whether `linear` for so many rows is the place for gates of what it makes."""
    kind = _kind(matrix)
    turns = kind != "int4" or (_hopper(matrix.codes.device) and _turns(matrix, dot=True))
    return 0 < m <= _few(kind) and turns


def _few(kind: str) -> int:
    """Rows up to which multiply-add is faster than tensor cores."""
    return 1 if kind in ("int4", "int8") else FEW


# By rows of a tile: outputs of a program, and how many programs there should be for each SM.
# Measured on an H100 in a chain of layers of Llama 3 8B.
_CUTS = {
    ("int4", 16): (64, 4), ("int4", 32): (64, 3), ("int4", 64): (64, 2),
    ("int8", 16): (128, 2), ("int8", 32): (64, 4), ("int8", 64): (64, 3),
    ("int4", 128): (128, 1), ("int8", 128): (64, 2),
}  # fmt: skip


@cache
def config(m: int, n: int, k: int, kind: str, sm_count: int) -> Form:
    """How a product is cut."""
    bits = 8 if kind in ("int8", "fp8") else 4
    words = triton.cdiv(k, block(bits)) * WORDS
    if m <= _few(kind):
        return _streamed(m, n, words, kind, sm_count)
    if kind == "fp8":
        rows = max(16, min(256, triton.next_power_of_2(m)))
        tiles = triton.cdiv(n, 64) * triton.cdiv(m, rows)
        splits = max(1, min(words // WORDS // 4, 4 * sm_count // tiles, 8)) if m <= 64 else 1
        return Form(True, 64, 4 if rows <= 64 else 8, rows=rows, stages=3, splits=splits)
    return _tiled(m, n, k, words, kind, sm_count)


def _tiled(m: int, n: int, k: int, words: int, kind: str, sm_count: int) -> Form:
    """How `dot` is cut for integers."""
    rows = max(16, min(128, triton.next_power_of_2(m)))
    block_n, per_sm = _CUTS.get((kind, rows), (128, 1))
    if kind == "int8" and rows in (64, 128) and m <= rows and n >= 128 * sm_count:
        block_n, per_sm = 128, 1
    tiles = triton.cdiv(n, block_n) * triton.cdiv(m, rows)
    short = rows == 128 and k <= _SHORT  # programs that share K gain less
    # Few rows and 4 bits gain by it only where there is much to multiply.
    joined = kind == "int8" or rows >= 64 or tiles >= sm_count or words > _LONG // 2
    if kind == "int4" and short and tiles < sm_count:
        if 2 * tiles > sm_count:
            return Form(True, 64, 4, rows=64, stages=2, joined=joined)
        block_n, tiles = 64, 2 * tiles
    most = min(words // WORDS // 2, 2 if short else 8)
    splits = max(1, min(round(per_sm * sm_count / tiles), most))
    cut = (block_n, block_n // 16)
    return Form(True, *cut, rows=rows, stages=3, splits=splits, joined=joined)


def _streamed(m: int, n: int, words: int, kind: str, sm_count: int) -> Form:
    """How `fma` is cut, measured as above, 8 bits of one row in a chain of layers. A thread of
    4-bit codes loads 16 bytes of each row."""
    warps = 4 if words >= 512 else 2 if words >= 256 else 1
    block_n, registers = 8 if kind == "fp8" and m == 1 else 4, None
    eight = kind in ("int8", "fp8") and m == 1
    if eight and 512 < words <= 1024 and n > 40 * sm_count:
        block_n, warps = 8, 8  # all words of a row are on their way before the row of x is there
    elif kind == "int4" and m == 1 and words > _LONG:
        warps, registers = 2, 112
    elif kind == "int4" and m == 1 and n * words > 1 << 21:
        block_n = 8
    while block_n > 1 and n < block_n * 2 * sm_count:
        block_n //= 2
    rows = triton.next_power_of_2(m)
    return Form(False, block_n, warps, 128 * warps, rows=rows, registers=registers)


def _by_cores(x: torch.Tensor, norm: bool) -> bool:
    """Whether `row_dot` takes such a row: times a norm's weights it might be beyond fp16."""
    kinds = (torch.bfloat16,) if norm else (torch.bfloat16, torch.float16)
    return x.dtype in kinds and _hopper(x.device)


def _by_halves(matrix: Coded) -> bool:
    """Whether codes have 4 bits, each half of a word's fields has one group, and zeros lie with
    their scales or there are none."""
    whole = matrix.group % (block(4) // 2) == 0 or matrix.group >= matrix.columns
    return _kind(matrix) == "int4" and whole and _zero(matrix) != 1


def _turns(matrix: Coded, dot: bool) -> bool:
    """Whether there is `one_row`, or `row_dot`, for this matrix: all words of a row at once."""
    return _by_halves(matrix) and _words(matrix).shape[1] <= (2048 if dot else 512)


def _joins(dtype: torch.dtype, matrix: Coded) -> bool:
    """Whether all fields of a word can be one product: of 8 bits if a row has one scale and no
    zero, of 4 bits if values can be scaled before, where scale and x have the same 16 bits."""
    if _kind(matrix) == "int8":
        return matrix.zero is None and matrix.group >= matrix.columns
    return _by_halves(matrix) and dtype.itemsize == 2 and matrix.scale.dtype is dtype


def _turning(n: int, words: int, sm_count: int, dot: bool) -> Form:
    """How `one_row` is cut, measured as above: 4 outputs where 8 would leave programs idle. Or
    `row_dot`, as it was fastest in a chain of layers of Llama 3 8B: 64 words for each warp, one
    program for each SM where rows are long, and fewer if there are few tiles, whose next ones then
    come to the L2 cache before the row is there."""
    if dot:
        block_w = max(64, triton.next_power_of_2(words))
        warps = min(16, block_w // 64)
        each, few = max(1, 24 // warps), triton.cdiv(n, 8) <= 4 * sm_count
        if few and each > 1:
            return Form(True, 8, warps, block_w, stages=3, turning=16 // warps * sm_count)
        return Form(True, 8, warps, block_w, turning=each * sm_count)
    warps = 4 if words > 256 else 2 if words > 128 else 1
    eight = 12 // warps * sm_count
    if n >= 0.8 * 8 * eight * triton.cdiv(n, 8 * eight):
        return Form(False, 8, warps, 128 * warps, turning=eight)
    return Form(False, 4, warps, 128 * warps, turning=16 // warps * sm_count)


def fitting(form: Form, bits: int, wide: int, room: int) -> Form:
    """A form of `dot` whose tiles in flight fit into `room` bytes of shared memory, with fewer
    stages first and then fewer rows. `wide`: loads of 4 bytes for each row of a tile of words."""
    while form.dot:
        words = 2 * form.block_n * 4 * WORDS
        each = 2 * block(bits) * form.rows + 4 * wide * form.block_n
        if words + form.stages * each <= room or form.rows == 16:
            break
        if form.stages > 2:
            form = form._replace(stages=form.stages - 1)
        else:
            form = form._replace(rows=form.rows // 2, splits=1)
    return form


def _wide(matrix: Coded) -> int:
    """Scales and zeros of 4 bytes that go with a word: they come by way of shared memory."""
    return _parts(matrix) * sum(
        grid is not None and grid.itemsize == 4 for grid in (matrix.scale, matrix.zero)
    )


@cache
def _hopper(device: torch.device) -> bool:
    """Whether there is arithmetic on pairs of bf16, which the assembly of `_codes` uses."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _words(matrix: Coded) -> torch.Tensor:
    return matrix.codes.view(torch.int32)


def _options(matrix: Coded) -> dict[str, Any]:
    """What a kernel is compiled for."""
    return {
        "K": matrix.columns,
        "G": min(matrix.group, matrix.columns),
        "WORDS": _words(matrix).shape[-1],
        "FIELDS": 32 // matrix.bits,
        "KIND": _kind(matrix),
        "ZERO": _zero(matrix),
    }


def _zero(matrix: Coded) -> int:
    """Where zeros lie: see `_codes.grid`."""
    scale, zero = matrix.scale, matrix.zero
    if zero is None:
        return 0
    return 2 if scale.stride(-1) == 2 and zero.data_ptr() == scale.data_ptr() + 2 else 1


def _kind(matrix: Coded) -> str:
    if matrix.codes.dtype is not torch.int32:
        return "fp8"
    return "table" if matrix.table is not None else f"int{matrix.bits}"


def _parts(matrix: Coded) -> int:
    """How many groups of columns the fields of a word belong to."""
    inside = matrix.group < matrix.columns and matrix.codes.dtype is torch.int32
    return max(1, block(matrix.bits) // matrix.group) if inside else 1


def _cut(form: Form, words: int) -> tuple[int, int]:
    """Words of a program, and how many programs that makes."""
    span = triton.cdiv(triton.cdiv(words, WORDS), form.splits) * WORDS
    return span, triton.cdiv(words, span)
