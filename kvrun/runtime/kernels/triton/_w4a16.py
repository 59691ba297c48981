"""The device's side of `w4a16.py`: `fma`, `dot` and `values`.

A word has FIELDS codes: 8 of 4 bits, or 4 of 8. PARTS is how many groups of columns its fields
belong to. Of e4m3 a word is what lies in 4 neighbouring columns.
"""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._overlap import release, wait
from kvrun.runtime.kernels.triton._skinny import _arrive, _collect, _finish, _input


@triton.jit
def _column(j, i: tl.constexpr, KIND: tl.constexpr, FIELDS: tl.constexpr):
    """The column whose code is field i of word j."""
    if KIND == "fp8":
        return j * 4 + i
    else:  # noqa: RET505 - what follows must not be compiled
        return j // 32 * (32 * FIELDS) + i * 32 + j % 32


@triton.jit
def _pick(words, mask: tl.constexpr, bits: tl.constexpr, ASM: tl.constexpr):
    """(words & mask) | bits in one instruction."""
    if ASM:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xEA;",
            "=r,r,r,r",
            [words, tl.full(words.shape, mask, tl.int32), tl.full(words.shape, bits, tl.int32)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:  # noqa: RET505
        return (words & mask) | bits


@triton.jit
def _e4m3(words, i: tl.constexpr):
    """Field i in fp32, times 2^-120: exponent and mantissa where those of fp32 are."""
    high = words << (24 - 8 * i)
    return ((high >> 4) & -2014314496).to(tl.float32, bitcast=True)


@triton.jit
def _code(words, table, i: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Field i of words in fp32, less `_excess` of it.

    A code is made the middle part of a mantissa, its lowest bit 1: there is nothing to convert,
    which would be slow, and what is too much is taken off the sums.
    """
    if KIND == "int4":
        if i == 0:
            words = words << 16
        elif i <= 2:
            words = words << 8
        elif i == 7:
            words = words >> 12
        elif i >= 5:
            words = words >> 8
        if i == 1 or i == 3 or i == 5:
            return _pick(words, 0xF000, 0x45000000, ASM).to(tl.float32, bitcast=True)
        else:  # noqa: RET505
            return _pick(words, 0xF0000, 0x43000000, ASM).to(tl.float32, bitcast=True)
    elif KIND == "int8":
        if ASM:
            wide = tl.inline_asm_elementwise(
                "prmt.b32 $0, $1, $2, $3;",
                "=r,r,r,r",
                [
                    words,
                    tl.full(words.shape, 0x47000000, tl.int32),
                    tl.full(words.shape, 0x7604 | (i << 4), tl.int32),
                ],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            wide = (((words >> (8 * i)) & 255) << 8) | 0x47000000
        return wide.to(tl.float32, bitcast=True)
    elif KIND == "table":
        return tl.load(table + ((words >> (4 * i)) & 15))
    else:
        return _e4m3(words, i)


@triton.jit
def _excess(i: tl.constexpr, KIND: tl.constexpr):
    """By how much `_code` of field i is more than a code's distance from the middle."""
    if KIND == "int8":
        return 32768.0 + 128.0
    elif i == 1 or i == 3 or i == 5:  # noqa: RET505
        return 2048.0 + 8.0
    else:
        return 128.0 + 8.0


@triton.jit
def _rounded(
    words, table, i: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr
):
    """Field i of words in `dtype`: the distance from the middle, or the value."""
    if KIND == "int4" and ASM and (dtype == tl.bfloat16 or dtype == tl.float16):
        # Two words at once: 128 + code in bf16, 1024 + code in fp16, less that and the middle.
        half: tl.constexpr = "0x5410" if i < 4 else "0x7632"
        low: tl.constexpr = "0" if i % 4 == 0 else "4"
        shift: tl.constexpr = low if i % 4 < 2 else "8" if i % 4 == 2 else "12"
        if dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t, one, c; mov.b32 one, 0x3F803F80; mov.b32 c, 0xC308C308; "
                "prmt.b32 t, $1, $2, " + half + "; shr.b32 t, t, " + shift + "; "
                "lop3.b32 t, t, 0x000F000F, 0x43004300, 0xEA; fma.rn.bf16x2 $0, t, one, c; }",
                "=r,r,r",
                [words],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        else:  # noqa: RET505
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t, c; mov.b32 c, 0x64086408; "
                "prmt.b32 t, $1, $2, " + half + "; shr.b32 t, t, " + shift + "; "
                "lop3.b32 t, t, 0x000F000F, 0x64006400, 0xEA; sub.f16x2 $0, t, c; }",
                "=r,r,r",
                [words],
                dtype=tl.float16,
                is_pure=True,
                pack=2,
            )
    elif KIND == "int4":
        return (((words >> (4 * i)) & 15) - 8).to(dtype)
    elif KIND == "int8":
        return (_code(words, table, i, KIND, ASM) - _excess(i, KIND)).to(dtype)
    elif KIND == "table":
        return _code(words, table, i, KIND, ASM).to(dtype)
    else:
        return (_e4m3(words, i) * 1.329227995784916e36).to(dtype)


@triton.jit
def _fold(x):
    """Sums over the 4 neighbouring words that one thread holds."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 4, 4]), 3)


@triton.jit
def _turn(
    sums, squares, words, x, norm, scale, zero, table, j, j0,
    K: tl.constexpr, G: tl.constexpr, FIELDS: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Adds the products, and the squares of x, of a tile of words that begins at word j0."""
    share: tl.constexpr = FIELDS // PARTS
    CODED: tl.constexpr = KIND == "int4" or KIND == "int8"
    for p in tl.static_range(PARTS):
        part = tl.zeros([sums.shape[0], sums.shape[1], words.shape[2]], tl.float32)
        whole = tl.zeros([sums.shape[0], 1, words.shape[2]], tl.float32)
        excess = tl.zeros([sums.shape[0], 1, words.shape[2]], tl.float32)
        for f in tl.static_range(share):
            k = _column(j0 + j, p * share + f, KIND, FIELDS)
            row = _input(x + k, k < K, K, ACT, EVEN).to(tl.float32)
            if NORM:
                squares += _fold(row * row)
                row *= tl.load(norm + k) if EVEN else tl.load(norm + k, mask=k < K, other=0.0)
            if ZERO:
                whole += row
            if CODED:
                excess += row * _excess(p * share + f, KIND)
            if KIND == "fp8":
                row *= 1.152921504606847e18
            part += row * _code(words, table, p * share + f, KIND, ASM)
        part = _fold(part)
        if CODED:
            part -= _fold(excess)
        first = j0 + tl.arange(0, words.shape[2] // 4)[None, None, :] * 4
        k = _column(first, p * share, KIND, FIELDS)
        factor = tl.load(scale + k // G, mask=k < K, other=0.0).to(tl.float32)
        if KIND == "fp8":
            factor *= 1.152921504606847e18
        if ZERO:
            offset = tl.load(zero + k // G, mask=k < K, other=0.0).to(tl.float32)
            part -= offset * _fold(whole)
        sums += part * factor
    return sums, squares


@triton.jit(do_not_specialize=["M"])
def fma(
    x, words, scale, zero, table, bias, add, norm, out,
    M, N, groups, x_stride, word_stride, add_stride, out_stride, eps,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs [ROWS, BLOCK_N], summed in registers; see `_skinny.fma`."""
    release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = tl.minimum(n, N - 1).to(tl.int64)[None, :, None]
    j = tl.arange(0, BLOCK_W)[None, None, :]
    EVEN: tl.constexpr = WORDS % BLOCK_W == 0 and WORDS * FIELDS == K
    words += own * word_stride + j
    scale += own * groups
    if ZERO:
        zero += own * groups
    # The first words before the wait, and each turn's while the one before it computes.
    tile = tl.load(words, mask=j < WORDS, other=0, eviction_policy="evict_first")
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_W // 4], tl.float32)
    squares = tl.zeros([ROWS, 1, BLOCK_W // 4], tl.float32)
    m = tl.arange(0, ROWS)[:, None]
    x += tl.minimum(m, M - 1)[:, :, None] * x_stride
    wait(PDL)
    for j0 in range(0, WORDS, BLOCK_W):
        later = j0 + BLOCK_W
        following = tl.load(
            words + later, mask=later + j < WORDS, other=0, eviction_policy="evict_first"
        )
        sums, squares = _turn(
            sums, squares, tile, x, norm, scale, zero, table, j, j0,
            K, G, FIELDS, PARTS, KIND, ZERO, NORM, ACT, EVEN, ASM,
        )  # fmt: skip
        tile = following
    y = tl.sum(sums, 2)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 2) / K + eps)
    _finish(y, m, n[None, :], bias, add, out, M, N, add_stride, out_stride, BIAS, ADD)


@triton.jit
def _multiply(
    rows, words, scale, zero, table, first, last, j,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes · rows transposed [BLOCK_N, ROWS] over words first to last, a block per turn."""
    share: tl.constexpr = FIELDS // PARTS
    EVEN: tl.constexpr = WORDS * FIELDS == K and WORDS % 32 == 0
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for j0 in tl.range(first, last, 32, num_stages=STAGES):
        if KIND == "fp8" and WORDS % 32 != 0:
            tile = tl.load(words + j0, mask=j0 + j[None, :] < WORDS, other=0)
        else:
            tile = tl.load(words + j0)
        for p in tl.static_range(PARTS):
            part = tl.zeros([BLOCK_N, ROWS], tl.float32)
            whole = tl.zeros([ROWS], tl.float32)
            for f in tl.static_range(share):
                k = _column(j0, p * share + f, KIND, FIELDS) + _column(j, 0, KIND, FIELDS)[:, None]
                row = tl.load(rows + k) if EVEN else tl.load(rows + k, mask=k < K, other=0.0)
                if ZERO:
                    whole += tl.sum(row.to(tl.float32), 0)
                code = _rounded(tile, table, p * share + f, KIND, dtype, ASM)
                part = tl.dot(code, row.to(dtype), part, input_precision="ieee")
            g = tl.minimum(_column(j0, p * share, KIND, FIELDS), K - 1) // G
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
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, transposed [BLOCK_N, ROWS], over words `span` · split and on."""
    release(PDL)
    tile, split, m0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * ROWS
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = m0 + tl.arange(0, ROWS)[None, :]
    own = tl.minimum(n, N - 1).to(tl.int64)
    j = tl.arange(0, 32)
    first = split * span
    dtype: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    wait(PDL)
    y = _multiply(
        x + tl.minimum(m, M - 1).to(tl.int64) * x_stride, words + own * word_stride + j[None, :],
        scale + own * groups, zero + own * groups if ZERO else zero, table,
        first, tl.minimum(first + span, WORDS), j,
        K, G, WORDS, FIELDS, PARTS, KIND, ZERO, ROWS, BLOCK_N, STAGES, dtype, ASM,
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
    tile = tl.load(words + n * word_stride + j, mask=(n < N) & (j < WORDS), other=0)
    wait(PDL)
    for i in tl.static_range(FIELDS):
        k = _column(j, i, KIND, FIELDS)
        inside = (n < N) & (k < K)
        value = _rounded(tile, table, i, KIND, tl.float32, False)
        if ZERO:
            value -= tl.load(zero + n * groups + k // G, mask=inside, other=0.0).to(tl.float32)
        value *= tl.load(scale + n * groups + k // G, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + n * K + k, value.to(out.dtype.element_ty), mask=inside)
