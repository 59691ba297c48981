"""The device's side of `w4a16.py`: `fma`, `dot` and `values`.

A word has FIELDS codes: 8 of 4 bits, or it is one of 8 bits. PARTS is how many groups of columns
the fields of a word belong to.
"""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._overlap import release, wait
from kvrun.runtime.kernels.triton._skinny import _arrive, _collect, _finish, _input


@triton.jit
def _column(j, i: tl.constexpr, FIELDS: tl.constexpr):
    """The column whose code is field i of word j."""
    if FIELDS == 1:
        return j
    else:  # noqa: RET505 - what follows must not be compiled
        return j // 16 * 128 + i * 16 + j % 16


@triton.jit
def _code(words, table, i: tl.constexpr, KIND: tl.constexpr):
    """Field i of words in fp32; of "int4" times 16^(i % 5).

    Where it stands, a field of 4 bits is the lower part of the mantissa of 2^23: no shift, and no
    conversion, which is slow.
    """
    if KIND == "int4":
        at: tl.constexpr = 4 * (i % 5)
        if i >= 5:
            words = words >> 20
        return ((words & (15 << at)) | 0x4B000000).to(tl.float32, bitcast=True) - (
            8388608.0 + 8.0 * (1 << at)
        )
    elif KIND == "table":  # noqa: RET505
        return tl.load(table + ((words >> (4 * i)) & 15))
    else:
        return words.to(tl.float32)


@triton.jit
def _rounded(words, table, i: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr):
    """Field i of words in `dtype`."""
    if KIND == "int4" and dtype == tl.bfloat16:  # 128 and more
        bits = ((words >> (4 * i)) & 15) | 0x4300
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True) - 136.0
    elif KIND == "int4" and dtype == tl.float16:  # noqa: RET505 - 1024 and more
        bits = ((words >> (4 * i)) & 15) | 0x6400
        return bits.to(tl.int16).to(tl.float16, bitcast=True) - 1032.0
    elif KIND == "int4":
        return (((words >> (4 * i)) & 15) - 8).to(dtype)
    else:
        return _code(words, table, i, KIND).to(dtype)


@triton.jit
def _fold(x, FOLD: tl.constexpr):
    """Sums over the neighbouring words that one thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // FOLD, FOLD]), 3)


@triton.jit
def _turn(
    sums, squares, words, x, norm, scale, zero, table, j, j0,
    K: tl.constexpr, G: tl.constexpr, FIELDS: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """Adds the products, and the squares of x, of a tile of words that begins at word j0."""
    share: tl.constexpr = FIELDS // PARTS
    for p in tl.static_range(PARTS):
        part = tl.zeros([sums.shape[0], sums.shape[1], words.shape[2]], tl.float32)
        whole = tl.zeros([sums.shape[0], 1, words.shape[2]], tl.float32)
        for f in tl.static_range(share):
            k = _column(j0 + j, p * share + f, FIELDS)
            row = _input(x + k, k < K, K, ACT, False).to(tl.float32)
            if NORM:
                squares += _fold(row * row, FOLD)
                row *= tl.load(norm + k, mask=k < K, other=0.0)
            if ZERO:
                whole += row
            if KIND == "int4":
                row *= 1.0 / (1 << (4 * ((p * share + f) % 5)))
            part += row * _code(words, table, p * share + f, KIND)
        part = _fold(part, FOLD)
        first = j0 + tl.arange(0, words.shape[2] // FOLD)[None, None, :] * FOLD
        k = _column(first, p * share, FIELDS)
        if ZERO:
            offset = tl.load(zero + k // G, mask=k < K, other=0.0).to(tl.float32)
            part -= offset * _fold(whole, FOLD)
        sums += part * tl.load(scale + k // G, mask=k < K, other=0.0).to(tl.float32)
    return sums, squares


@triton.jit(do_not_specialize=["M"])
def fma(
    x, words, scale, zero, table, bias, add, norm, out,
    M, N, groups, x_stride, word_stride, add_stride, out_stride, eps,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, FOLD: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs [ROWS, BLOCK_N], summed in registers; see `_skinny.fma`."""
    release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(n, N - 1).to(tl.int64)[None, :, None]
    j = tl.arange(0, BLOCK_W)[None, None, :]
    words += own * word_stride + j
    scale += own * groups
    if ZERO:
        zero += own * groups
    # The first words before the wait, and each turn's while the one before it computes.
    tile = tl.load(words, mask=j < WORDS, other=0.0, eviction_policy="evict_first")
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_W // FOLD], tl.float32)
    squares = tl.zeros([ROWS, 1, BLOCK_W // FOLD], tl.float32)
    m = tl.arange(0, ROWS)[:, None]
    x += tl.minimum(m, M - 1)[:, :, None] * x_stride
    wait(PDL)
    for j0 in range(0, WORDS, BLOCK_W):
        later = j0 + BLOCK_W
        following = tl.load(
            words + later, mask=later + j < WORDS, other=0.0, eviction_policy="evict_first"
        )
        sums, squares = _turn(
            sums, squares, tile, x, norm, scale, zero, table, j, j0,
            K, G, FIELDS, PARTS, KIND, ZERO, NORM, ACT, FOLD,
        )  # fmt: skip
        tile = following
    y = tl.sum(sums, 2)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 2) / K + eps)
    _finish(y, m, n[None, :], bias, add, out, M, N, add_stride, out_stride, BIAS, ADD)


@triton.jit
def _multiply(
    rows, words, scale, zero, table, first, last, j, inside,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Codes · rows transposed [BLOCK_N, ROWS] over words first to last; a tile is in one group for
    each of PARTS."""
    share: tl.constexpr = FIELDS // PARTS
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for j0 in tl.range(first, last, BLOCK_W, num_stages=STAGES):
        tile = tl.load(words + j0, mask=j0 + j[None, :] < WORDS, other=0.0)
        for p in tl.static_range(PARTS):
            part = tl.zeros([BLOCK_N, ROWS], tl.float32)
            whole = tl.zeros([ROWS], tl.float32)
            for f in tl.static_range(share):
                k = _column(j0 + j, p * share + f, FIELDS)[:, None]
                row = tl.load(rows + k, mask=inside & (k < K), other=0.0)
                if ZERO:
                    whole += tl.sum(row.to(tl.float32), 0)
                code = _rounded(tile, table, p * share + f, KIND, dtype)
                part = tl.dot(code, row.to(dtype), part, input_precision="ieee")
            g = tl.minimum(_column(j0, p * share, FIELDS), K - 1) // G
            if ZERO:
                part -= tl.load(zero + g).to(tl.float32) * whole[None, :]
            sums += tl.load(scale + g).to(tl.float32) * part
    return sums


@triton.jit(do_not_specialize=["M", "splits"])
def dot(
    x, words, scale, zero, table, bias, add, out, parts, counters,
    M, N, groups, x_stride, word_stride, add_stride, out_stride, span, splits,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, transposed [BLOCK_N, ROWS], over words `span` · split and on."""
    release(PDL)
    tile, split, m0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * ROWS
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = m0 + tl.arange(0, ROWS)[None, :]
    own = tl.minimum(n, N - 1).to(tl.int64)
    j = tl.arange(0, BLOCK_W)
    first = split * span
    dtype: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    wait(PDL)
    y = _multiply(
        x + m.to(tl.int64) * x_stride, words + own * word_stride + j[None, :],
        scale + own * groups, zero + own * groups if ZERO else zero, table,
        first, tl.minimum(first + span, WORDS), j, m < M,
        K, G, WORDS, FIELDS, PARTS, KIND, ZERO, ROWS, BLOCK_N, BLOCK_W, STAGES, dtype,
    )  # fmt: skip
    if SPLIT:
        parts += tile * splits * ((BLOCK_N + 1) * ROWS)
        part = parts + split * ((BLOCK_N + 1) * ROWS)
        square = tl.zeros([ROWS], tl.float32)
        if _arrive(y, square, part, counters + tile, BLOCK_N, ROWS) < splits - 1:
            return
        y, square = _collect(parts, counters + tile, splits, BLOCK_N, ROWS)
    _finish(y, m, n, bias, add, out, M, N, add_stride, out_stride, BIAS, ADD)


@triton.jit
def values(
    words, scale, zero, table, out, N, groups, word_stride,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The matrix's values [BLOCK_N rows, FIELDS · BLOCK_W columns]."""
    release(PDL)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    j = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    tile = tl.load(words + n * word_stride + j, mask=(n < N) & (j < WORDS), other=0.0)
    wait(PDL)
    for i in tl.static_range(FIELDS):
        k = _column(j, i, FIELDS)
        inside = (n < N) & (k < K)
        value = _rounded(tile, table, i, KIND, tl.float32)
        if ZERO:
            value -= tl.load(zero + n * groups + k // G, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(scale + n * groups + k // G, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + n * K + k, value.to(out.dtype.element_ty), mask=inside)
