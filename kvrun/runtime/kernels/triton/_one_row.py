"""One row times codes of 4 bits, for `w4a16.py`: the row stays in registers.

What the row takes (to read it, its norm, what codes are too much) is done once for all tiles of a
program, and the words of the next tile are on their way while one is multiplied.
"""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._codes import halves
from kvrun.runtime.kernels.triton._overlap import release, wait
from kvrun.runtime.kernels.triton._skinny import _finish, _load
from kvrun.runtime.kernels.triton._w4a16 import _code, _column, _fold


@triton.jit
def _field(x, norm, j, i: tl.constexpr, K: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr):
    """The row where field i of words j is, and sums of its squares."""
    k = _column(j, i, 8)
    row = _load(x + k, k < K, EVEN).to(tl.float32)
    squares = _fold(row * row)
    if NORM:
        row *= _load(norm + k, k < K, EVEN)
    return row, squares


@triton.jit
def _fields(x, norm, j, K: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr):
    """The row where each field of words j is, and sums of its squares."""
    a, squares = _field(x, norm, j, 0, K, NORM, EVEN)
    b, more = _field(x, norm, j, 1, K, NORM, EVEN)
    squares += more
    c, more = _field(x, norm, j, 2, K, NORM, EVEN)
    squares += more
    d, more = _field(x, norm, j, 3, K, NORM, EVEN)
    squares += more
    e, more = _field(x, norm, j, 4, K, NORM, EVEN)
    squares += more
    f, more = _field(x, norm, j, 5, K, NORM, EVEN)
    squares += more
    g, more = _field(x, norm, j, 6, K, NORM, EVEN)
    squares += more
    h, more = _field(x, norm, j, 7, K, NORM, EVEN)
    squares += more
    return a, b, c, d, e, f, g, h, squares


@triton.jit
def _half(words, a, b, c, d, FIRST: tl.constexpr, ASM: tl.constexpr):
    """Four fields of words times the row there."""
    sums = a * _code(words, None, FIRST, "int4", ASM)
    sums += b * _code(words, None, FIRST + 1, "int4", ASM)
    sums += c * _code(words, None, FIRST + 2, "int4", ASM)
    sums += d * _code(words, None, FIRST + 3, "int4", ASM)
    return _fold(sums)


@triton.jit
def _stored(grid, at, there, ZERO: tl.constexpr):
    """Scales of groups `at`, and with them zeros, as they are stored."""
    if ZERO:
        grid = grid.to(tl.pointer_type(tl.int32))
    return tl.load(grid + at, mask=there, other=0)


@triton.jit
def _grid(stored, dtype: tl.constexpr, ZERO: tl.constexpr):
    """What `_stored` has loaded, in fp32."""
    if ZERO:
        return halves(stored, dtype)
    else:  # noqa: RET505
        return stored.to(tl.float32), 0.0


@triton.jit
def one_row(
    x, words, scale, bias, add, norm, out, N, groups, word_stride, eps, tiles,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, ASM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_N outputs, every so many programs. BLOCK_W: no fewer than a row has words.

    Both halves of a word's fields lie in one group each. ZERO: zeros lie behind their scales, and
    `groups` counts pairs of a row.
    """
    release(PDL)
    first, step = tl.program_id(0), tl.num_programs(0)
    rows, j = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_W)[None, None, :]
    quads = tl.arange(0, BLOCK_W // 4)[None, None, :] * 4
    low, high = _column(quads, 0, 8), _column(quads, 4, 8)
    EVEN: tl.constexpr = WORDS == BLOCK_W and WORDS * 8 == K
    own = tl.minimum(first * BLOCK_N + rows, N - 1).to(tl.int64)[None, :, None]
    tile = tl.load(
        words + own * word_stride + j, mask=j < WORDS, other=0, eviction_policy="evict_first"
    )
    at_low = _stored(scale, own * groups + low // G, low < K, ZERO)
    at_high = _stored(scale, own * groups + high // G, high < K, ZERO)
    wait(PDL)
    a, b, c, d, e, f, g, h, squares = _fields(x, norm, j, K, NORM, EVEN)
    whole_low, whole_high = _fold(a + b + c + d), _fold(e + f + g + h)
    # See `_code`: 128 too much and the middle of a code's range; in fields 1, 3 and 5, 2048.
    much_low = (128.0 + 8.0) * whole_low + (2048.0 - 128.0) * _fold(b + d)
    much_high = (128.0 + 8.0) * whole_high + (2048.0 - 128.0) * _fold(f)
    length = 1.0
    if NORM:
        length = tl.rsqrt(tl.sum(squares, 2) / K + eps)
    for t in range(first, tiles, step):
        later = tl.minimum((t + step) * BLOCK_N + rows, N - 1).to(tl.int64)[None, :, None]
        left = tl.where(t + step < tiles, WORDS, 0)
        next_tile = tl.load(
            words + later * word_stride + j, mask=j < left, other=0, eviction_policy="evict_first"
        )
        next_low = _stored(scale, later * groups + low // G, low < K, ZERO)
        next_high = _stored(scale, later * groups + high // G, high < K, ZERO)
        factor, offset = _grid(at_low, scale.dtype.element_ty, ZERO)
        sums = (_half(tile, a, b, c, d, 0, ASM) - much_low - offset * whole_low) * factor
        factor, offset = _grid(at_high, scale.dtype.element_ty, ZERO)
        sums += (_half(tile, e, f, g, h, 4, ASM) - much_high - offset * whole_high) * factor
        n = (t * BLOCK_N + rows)[None, :]
        y, m = tl.sum(sums, 2) * length, tl.arange(0, 1)[:, None]
        _finish(y, m, n, bias, add, out, 1, N, 0, 0, BIAS, ADD)
        tile, at_low, at_high = next_tile, next_low, next_high
