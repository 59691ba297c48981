"""The device's side of `w4a16.py`: `fma`, `dot` and `values`.

A word has FIELDS codes: 8 of 4 bits, or 4 of 8. PARTS is how many groups of columns its fields
belong to. Of e4m3 a word is what lies in 4 neighbouring columns, and is read as these.
"""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._codes import grid, multiply_codes, multiply_scaled
from kvrun.runtime.kernels.triton._overlap import release, wait
from kvrun.runtime.kernels.triton._skinny import (
    _arrive,
    _collect,
    _finish,
    _finish_gated,
    _input,
    _row,
)


@triton.jit
def _column(j, i: tl.constexpr, FIELDS: tl.constexpr):
    """The column whose code is field i of word j."""
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
def _look(table, code):
    """table[code] by choices between its 16 values, which is faster than asking any memory."""
    odd, second = (code & 1) != 0, (code & 2) != 0
    x0 = tl.where(odd, tl.load(table + 1), tl.load(table))
    x1 = tl.where(odd, tl.load(table + 3), tl.load(table + 2))
    x2 = tl.where(odd, tl.load(table + 5), tl.load(table + 4))
    x3 = tl.where(odd, tl.load(table + 7), tl.load(table + 6))
    low = tl.where((code & 4) != 0, tl.where(second, x3, x2), tl.where(second, x1, x0))
    x0 = tl.where(odd, tl.load(table + 9), tl.load(table + 8))
    x1 = tl.where(odd, tl.load(table + 11), tl.load(table + 10))
    x2 = tl.where(odd, tl.load(table + 13), tl.load(table + 12))
    x3 = tl.where(odd, tl.load(table + 15), tl.load(table + 14))
    high = tl.where((code & 4) != 0, tl.where(second, x3, x2), tl.where(second, x1, x0))
    return tl.where((code & 8) != 0, high, low)


@triton.jit
def _code(words, table, i: tl.constexpr, KIND: tl.constexpr, ASM: tl.constexpr):
    """Field i of words in fp32: a code, and what `_turn` takes off the sums.

    A code is made the middle part of a mantissa, its lowest bit 1: there is nothing to convert,
    which would be slow. That is 128, or in fields 1, 3 and 5 of 4 bits 2048 too much, of 8 bits
    32768, and the middle of a code's range.
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
    else:
        return _look(table, words >> (4 * i))


@triton.jit
def _fold(x, count: tl.constexpr = 4):
    """Sums over the neighbours that one thread holds, of words or of columns."""
    return tl.sum(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // count, count]), 3)


@triton.jit
def _turn(
    sums, squares, words, x, norm, scale, zero, table, j, j0,
    K: tl.constexpr, G: tl.constexpr, FIELDS: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr,
    ZERO: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Adds the products, and the squares of x, of a tile of words that begins at word j0."""
    share: tl.constexpr = FIELDS // PARTS
    for p in tl.static_range(PARTS):
        part = tl.zeros([sums.shape[0], sums.shape[1], words.shape[2]], tl.float32)
        whole = tl.zeros([sums.shape[0], 1, words.shape[2]], tl.float32)
        odd = tl.zeros([sums.shape[0], 1, words.shape[2]], tl.float32)
        for f in tl.static_range(share):
            k = _column(j0 + j, p * share + f, FIELDS)
            row = _input(x + k, k < K, K, ACT, EVEN).to(tl.float32)
            if NORM:
                squares += _fold(row * row)
                row *= tl.load(norm + k) if EVEN else tl.load(norm + k, mask=k < K, other=0.0)
            whole += row
            if KIND == "int4" and (p * share + f) % 2 == 1 and p * share + f < 7:
                odd += row
            part += row * _code(words, table, p * share + f, KIND, ASM)
        part = _fold(part)
        first = j0 + tl.arange(0, words.shape[2] // 4)[None, None, :] * 4
        k = _column(first, p * share, FIELDS)
        factor, offset = grid(scale, zero, k // G, k < K, ZERO, True)
        if KIND == "int4":
            part -= (128.0 + 8.0 + offset) * _fold(whole) + (2048.0 - 128.0) * _fold(odd)
        elif KIND == "int8":
            part -= (32768.0 + 128.0 + offset) * _fold(whole)
        elif ZERO:
            part -= offset * _fold(whole)
        sums += part * factor
    return sums, squares


# The sign and the rest of each of four e4m3 where fp32 has its sign, the low half of its exponent
# and the top of its mantissa. What that is too little, 2^-120, the other factors make up for.
_E4M3_ASM = tl.constexpr(
    "{.reg .b32 t;\n"
    + "".join(
        f"shl.b32 t, $4, {24 - 8 * i}; shr.s32 t, t, 4; and.b32 ${i}, t, 0x87f00000;\n"
        for i in range(4)
    )
    + "}"
)
_HALF = tl.constexpr(2.0**60)


@triton.jit
def _e4m3(words, i: tl.constexpr):
    """Byte i of words, an e4m3 that is not NaN, as the bits of fp32 times 2^-120."""
    return ((words << (24 - 8 * i)) >> 4) & -0x78100000  # 0x87f00000


@triton.jit
def _turn_e4m3(
    sums, squares, words, x, norm, scale, j0,
    K: tl.constexpr, G: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """`_turn` where columns follow each other: a thread holds two words, 8 of them."""
    k = j0 * 4 + tl.arange(0, words.shape[2] * 4)[None, None, :]
    row = _input(x + k, k < K, K, ACT, EVEN).to(tl.float32)
    if NORM:
        squares += _fold(row * row, 8)
        row *= tl.load(norm + k) if EVEN else tl.load(norm + k, mask=k < K, other=0.0)
    first = j0 * 4 + tl.arange(0, words.shape[2] // 2)[None, None, :] * 8
    factor = tl.load(scale + first // G, mask=first < K, other=0.0).to(tl.float32)
    if ASM:
        b0, b1, b2, b3 = tl.inline_asm_elementwise(
            _E4M3_ASM, "=r,=r,=r,=r,r", [words], (tl.int32, tl.int32, tl.int32, tl.int32), True, 1
        )
    else:
        b0, b1, b2, b3 = _e4m3(words, 0), _e4m3(words, 1), _e4m3(words, 2), _e4m3(words, 3)
    bits = tl.join(tl.join(b0, b2), tl.join(b1, b3))
    code = tl.reshape(bits, [1, words.shape[1], words.shape[2] * 4]).to(tl.float32, bitcast=True)
    return sums + _fold(row * _HALF * code, 8) * (factor * _HALF), squares


@triton.jit(do_not_specialize=["M"])
def fma(
    x, words, scale, zero, table, bias, add, norm, out,
    M, N, groups, x_stride, word_stride, add_stride, out_stride, eps,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    NORM: tl.constexpr, ACT: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    GATED: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs [ROWS, BLOCK_N], summed in registers; see `_skinny.fma`."""
    release(PDL)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = _row(n, N, GATED)[None, :, None]
    PER: tl.constexpr = 2 if KIND == "fp8" else 4  # words of a thread that stand side by side
    j = tl.arange(0, BLOCK_W)[None, None, :]
    if KIND == "fp8":  # no more words than columns of x are loaded in one go
        j = tl.max_contiguous(j, [1, 1, PER])
    EVEN: tl.constexpr = WORDS % BLOCK_W == 0 and WORDS * FIELDS == K
    words += own * word_stride + j
    scale += own * groups
    if ZERO:
        zero += own * groups
    # The first words before the wait, and each turn's while the one before it computes.
    tile = tl.load(words, mask=j < WORDS, other=0, eviction_policy="evict_first")
    sums = tl.zeros([ROWS, BLOCK_N, BLOCK_W // PER], tl.float32)
    squares = tl.zeros([ROWS, 1, BLOCK_W // PER], tl.float32)
    m = tl.arange(0, ROWS)[:, None]
    x += tl.minimum(m, M - 1)[:, :, None] * x_stride
    wait(PDL)
    for j0 in range(0, WORDS, BLOCK_W):
        later = j0 + BLOCK_W
        following = tile
        if WORDS > BLOCK_W:
            following = tl.load(
                words + later,
                mask=later + j < WORDS,
                other=0,
                eviction_policy="evict_first",
            )
        if KIND == "fp8":
            sums, squares = _turn_e4m3(
                sums, squares, tile, x, norm, scale, j0, K, G, NORM, ACT, EVEN, ASM
            )
        else:
            sums, squares = _turn(
                sums, squares, tile, x, norm, scale, zero, table, j, j0,
                K, G, FIELDS, PARTS, KIND, ZERO, NORM, ACT, EVEN, ASM,
            )  # fmt: skip
        tile = following
    y = tl.sum(sums, 2)
    if NORM:
        y *= tl.rsqrt(tl.sum(squares, 2) / K + eps)
    if GATED != "":
        _finish_gated(y, m, n[None, :], out, M, N, out_stride, GATED)
    else:
        _finish(y, m, n[None, :], bias, add, out, M, N, add_stride, out_stride, BIAS, ADD)


@triton.jit
def _spread(
    words, scale, zero, table, j0,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """The values of 32 words from j0 on of each row, [BLOCK_N, 32 · FIELDS] in `dtype`.

    A word is seen once for each of its fields, in a dimension that one thread holds whole: shifts
    are constants, and nothing moves between threads until the product.
    """
    field = tl.arange(0, FIELDS)
    g = tl.minimum(j0 * FIELDS + 32 * field, K - 1)[None, :] // G
    factor, offset = grid(scale, zero, g, True, ZERO, False)
    if KIND == "fp8":
        column = j0 * 4 + tl.arange(0, 32 * FIELDS)[None, :]
        at = words.to(tl.pointer_type(tl.int8)) + column
        code = tl.load(at) if WORDS % 32 == 0 else tl.load(at, mask=column < K, other=0)
        code = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
        value = tl.reshape(code, [code.shape[0], FIELDS, 32])
        middle = 0.0
    else:
        word = tl.load(words + j0 + tl.arange(0, 32)[None, :])[:, None, :]
        code = word >> (field * (32 // FIELDS))[None, :, None]
        if KIND == "int4":  # the middle part of a mantissa, as in `_code`
            value = ((code & 15) << 16 | 0x43000000).to(tl.float32, bitcast=True)
            middle = 128.0 + 8.0
        elif KIND == "int8":
            value = ((code & 255) << 8 | 0x47000000).to(tl.float32, bitcast=True)
            middle = 32768.0 + 128.0
        else:
            value = _look(table, code)
            middle = 0.0
    if ZERO:
        middle += offset[:, :, None]
    value = (value - middle) * factor[:, :, None]
    return tl.reshape(value.to(dtype), [value.shape[0], FIELDS * 32])


@triton.jit
def _multiply(
    rows, words, scale, zero, table, first, last,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Values · rows transposed [BLOCK_N, ROWS] over words first to last, a block per turn."""
    EVEN: tl.constexpr = WORDS * FIELDS == K and WORDS % 32 == 0
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    inner = tl.arange(0, 32 * FIELDS)[:, None]
    for j0 in tl.range(first, last, 32, num_stages=STAGES):
        k = j0 * FIELDS + inner
        row = tl.load(rows + k) if EVEN else tl.load(rows + k, mask=k < K, other=0.0)
        tile = _spread(words, scale, zero, table, j0, K, G, WORDS, FIELDS, KIND, ZERO, dtype)
        sums = tl.dot(tile, row.to(dtype), sums, input_precision="ieee")
    return sums


@triton.jit(do_not_specialize=["M", "splits"])
def dot(
    x, words, scale, zero, table, bias, add, out, parts, counters,
    M, N, groups, x_stride, word_stride, add_stride, out_stride, span, splits,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, SPLIT: tl.constexpr, WIDE: tl.constexpr,
    JOINED: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of outputs, transposed [BLOCK_N, ROWS], over words `span` · split and on."""
    release(PDL)
    # Neighbours share weights, so that these are read once.
    m_tiles = tl.cdiv(M, ROWS)
    place, split = tl.program_id(0), tl.program_id(1)
    tile, m0 = place // m_tiles, place % m_tiles * ROWS
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = m0 + tl.arange(0, ROWS)[None, :]
    own = tl.minimum(n, N - 1).to(tl.int64)
    first = split * span
    dtype: tl.constexpr = tl.float32 if WIDE else x.dtype.element_ty
    wait(PDL)
    rows = x + tl.minimum(m, M - 1).to(tl.int64) * x_stride
    words, scale = words + own[:, None] * word_stride, scale + own * groups
    if ZERO:
        zero += own * groups
    last = tl.minimum(first + span, WORDS)
    if JOINED and KIND == "int4":
        y = multiply_scaled(
            rows, words, scale, zero, first, last,
            K, G, WORDS, ZERO, ROWS, BLOCK_N, STAGES, ASM, dtype,
        )  # fmt: skip
    elif KIND == "int4" or KIND == "int8":
        y = multiply_codes(
            rows, words, scale, zero, first, last,
            K, G, WORDS, FIELDS, PARTS, KIND, ZERO, ROWS, BLOCK_N, STAGES, JOINED, ASM, dtype,
        )  # fmt: skip
    else:
        y = _multiply(
            rows, words, scale[:, None], zero[:, None] if ZERO else zero, table, first, last,
            K, G, WORDS, FIELDS, KIND, ZERO, ROWS, BLOCK_N, STAGES, dtype,
        )  # fmt: skip
    if SPLIT:
        parts += place * splits * ((BLOCK_N + 1) * ROWS)
        part = parts + split * ((BLOCK_N + 1) * ROWS)
        square = tl.zeros([ROWS], tl.float32)
        if _arrive(y, square, part, counters + place, BLOCK_N, ROWS) < splits - 1:
            return
        y, square = _collect(parts, counters + place, splits, BLOCK_N, ROWS)
    _finish(y, m, n[:, None], bias, add, out, M, N, add_stride, out_stride, BIAS, ADD)


@triton.jit
def values(
    words, scale, zero, table, ids, out, N, groups, word_stride,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Values of the matrix's N rows, or of the N rows that are CHOSEN by `ids`: a tile
    [BLOCK_N rows, 32 · FIELDS columns]."""
    release(PDL)
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    j0 = tl.program_id(1) * 32
    own = tl.minimum(n, N - 1)
    if CHOSEN:
        wait(PDL)  # for the ids; the matrix is there before
        own = tl.load(ids + own).to(tl.int64)
    if ZERO:
        zero += own * groups
    value = _spread(
        words + own * word_stride, scale + own * groups, zero, table, j0,
        K, G, WORDS, FIELDS, KIND, ZERO, out.dtype.element_ty,
    )  # fmt: skip
    if not CHOSEN:
        wait(PDL)
    k = j0 * FIELDS + tl.arange(0, 32 * FIELDS)[None, :]
    tl.store(out + n * K + k, value, mask=(n < N) & (k < K))
