"""One row times codes of 4 bits by tensor cores, for `w4a16.py`: `_one_row.py` with a third of its
instructions, and values of the row that are rounded to its dtype.

A tile of words is [8 outputs, warps, PARTS, 16 words]: a thread holds 4 neighbouring words of one
output in each of 4 PARTS of a set, which is as `mma.m16n8k16` wants its left operand once a word is
taken apart: two fields, i and i + 4, make a register. Which columns these are, is told by the right
operand alone: of its 8 columns one for each part has the row where fields 0 to 3 are, and one where
fields 4 to 7 are, zeros beside it. What a part gives with the columns of other parts is dropped.
"""

import itertools

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._codes import halves
from kvrun.runtime.kernels.triton._one_row import _grid, _stored
from kvrun.runtime.kernels.triton._overlap import release, wait
from kvrun.runtime.kernels.triton._skinny import _finish_gated, _load
from kvrun.runtime.kernels.triton._skinny import _row as _of_matrix


def _of_set(dtype: str, one: str) -> str:
    """The assembly for a set: $32 to $47 its words, 4 of each part; $48 to $63 the row, field by
    field, where these words are. Leaves the sums of fields 0 to 3 in $0 and of 4 to 7 in $16, each
    thread of four those of its own part, and copies of both in all other outputs.

    A field is made the lowest bits of a mantissa whose value is then `one` and the field.
    """
    text = ["{", ".reg .b32 lane, a<4>;", ".reg .f32 c<8>, low, high;", ".reg .pred own<3>;"]
    text += [f"mov.f32 c{i}, 0f00000000;" for i in range(8)]
    for pair, word, i in itertools.product((0, 1), range(4), (0, 2)):
        for field, half in itertools.product((0, 1), (0, 1)):  # 8 outputs of 2 parts are 16 rows
            to, of = f"a{2 * field + half}", f"${32 + 8 * pair + 4 * half + word}"
            if i + field:
                text.append(f"shr.u32 {to}, {of}, {4 * (i + field)};")
                of = to
            text.append(f"lop3.b32 {to}, {of}, 0x000f000f, {one}, 0xEA;")
        a, b = "a0, a1, a2, a3", f"${48 + 4 * i + word}, ${52 + 4 * i + word}"
        sums = ", ".join(f"c{4 * pair + i}" for i in range(4))
        kind = f"m16n8k16.row.col.f32.{dtype}.{dtype}.f32"
        text.append(f"mma.sync.aligned.{kind} {{{sums}}}, {{{a}}}, {{{b}}}, {{{sums}}};")
    text += ["mov.u32 lane, %laneid;", "and.b32 lane, lane, 3;"]
    text += [f"setp.eq.u32 own{part}, lane, {part};" for part in range(3)]
    for c, to in enumerate(("low", "high")):
        text.append(f"selp.f32 {to}, c{4 + c}, c{6 + c}, own2;")
        text.append(f"selp.f32 {to}, c{2 + c}, {to}, own1;")
        text.append(f"selp.f32 {to}, c{c}, {to}, own0;")
        text += [f"mov.f32 ${16 * c + i}, {to};" for i in range(16)]
    return "\n".join([*text, "}"])


_BF16_ASM = tl.constexpr(_of_set("bf16", "0x43004300"))
_F16_ASM = tl.constexpr(_of_set("f16", "0x64006400"))
_ASK_ASM = tl.constexpr(
    "{.reg .pred asks; setp.ne.u32 asks, $1, 0; mov.u32 $0, 0;"
    " @asks cp.async.bulk.prefetch.L2.global [$2], $3;}"
)
_OPERANDS = tl.constexpr(",".join(["=f"] * 32 + ["r"] * 32))


@triton.jit
def _first(a, b):
    return a


@triton.jit
def _pick(sums, SETS: tl.constexpr):
    """One of the 16 equal outputs of each thread and set, [4 parts, 8 outputs, warps, SETS]."""
    sums = tl.reshape(sums, [8, sums.shape[1], SETS, 4, 4, 4])
    return tl.permute(tl.reduce(tl.reduce(sums, 5, _first), 3, _first), (3, 0, 1, 2))


@triton.jit
def _sums(words, row, SETS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Words times the row, of fields 0 to 3 and of 4 to 7, [4 parts, 8 outputs, warps, SETS, 2].
    Each field is 128, or with fp16 1024, more than it is."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            _BF16_ASM if dtype == tl.bfloat16 else _F16_ASM, _OPERANDS, [words, row],
            (tl.float32, tl.float32), True, 16,
        )  # fmt: skip
        return tl.join(_pick(low, SETS), _pick(high, SETS))
    else:  # noqa: RET505
        W: tl.constexpr = words.shape[1]
        one: tl.constexpr = 128 if dtype == tl.bfloat16 else 1024
        words = tl.permute(tl.reshape(words, [8, W, SETS, 4, 16]), (3, 0, 1, 2, 4))
        row = tl.permute(tl.reshape(row, [4, 2, W, SETS, 4, 16]), (4, 0, 1, 2, 3, 5))
        place = tl.arange(0, 4)[:, None, None, None, None, None]
        low = tl.zeros([4, 8, W, SETS], tl.float32)
        high = tl.zeros([4, 8, W, SETS], tl.float32)
        for i in tl.static_range(4):
            here = tl.sum(tl.sum(tl.where(place == i, row, 0), 0), 1)  # [parts, warps, SETS, 16]
            first, second = halves(here[:, None, :, :, :], dtype)
            low += tl.sum(first * ((words >> (4 * i) & 15) + one).to(tl.float32), 4)
            high += tl.sum(second * ((words >> (4 * i + 16) & 15) + one).to(tl.float32), 4)
        return tl.join(low, high)


@triton.jit
def _places(outs, SETS: tl.constexpr, WARPS: tl.constexpr):
    """Which words a tile is, and which columns the row beside it."""
    place, word = tl.arange(0, 4 * SETS)[None, None, :, None], tl.arange(0, 16)
    word = word[None, None, None, :]
    span = place // 4 * WARPS + tl.arange(0, WARPS)[None, :, None, None]  # 64 words
    j = (span * 4 + place % 4) * 16 + word
    # A thread has the row of the part and the half of fields that its output's number says.
    column = outs[:, None, None, None]
    at = span * 4 + column // 2
    k = at // 2 * 256 + (place % 4 + 4 * (column % 2)) * 32 + at % 2 * 16 + word
    return j, tl.max_contiguous(k, [1, 1, 1, 4])


@triton.jit
def _groups(K: tl.constexpr, G: tl.constexpr, SETS: tl.constexpr, WARPS: tl.constexpr):
    """The group of the columns of each sum, and which sums are of columns of the matrix."""
    pair = tl.arange(0, SETS)[None, :] * WARPS + tl.arange(0, WARPS)[:, None]
    pair = pair[None, None, :, :] * 4 + tl.arange(0, 4)[:, None, None, None]
    pair, half = pair[:, :, :, :, None] // 2, tl.arange(0, 2)[None, None, None, None, :]
    group = pair * 2 + half if G == 128 else (pair * 2 + half) * 128 // G
    return group, pair * 256 < K if K % 256 == 0 else (pair * 2 + half) * 128 < K


@triton.jit
def _of_x(x, k, gain, K: tl.constexpr, NORM: tl.constexpr, EVEN: tl.constexpr):
    """The row at columns k as bits of x's dtype, in the half of a register where the field of that
    column is, and the sum of its squares."""
    row = _load(x + k, k < K, EVEN)
    square = 0.0
    if NORM:
        wide = row.to(tl.float32)
        square = tl.sum(tl.reshape(wide * wide, [wide.numel]))
        row = (wide * gain).to(row.dtype)
    bits = row.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    odd = tl.arange(0, 8)[:, None, None, None] % 2
    return bits << (16 * odd), square


@triton.jit
def _words(words, stride, n, N, j, WORDS: tl.constexpr, BLOCK_W: tl.constexpr, GATED: tl.constexpr):
    """Words j of outputs n; what is beyond the matrix is anything, and meets zeros of the row."""
    there = (n < N)[:, None, None, None]
    if WORDS < BLOCK_W:
        there &= j < WORDS
    at = words + _of_matrix(n, N, GATED)[:, None, None, None] * stride + j
    return tl.load(at, mask=there, eviction_policy="evict_first")


@triton.jit
def _ask(words, stride, n, N, WORDS: tl.constexpr, WARPS: tl.constexpr, ASM: tl.constexpr):
    """One thread has words of outputs n to n + 7 begin their way to the L2 cache."""
    if ASM:
        size = (tl.minimum(N - n, 8) - 1) * stride.to(tl.int32) + WORDS
        asks = (tl.arange(0, 32 * WARPS) == 0) & (n < N)
        at = tl.full(asks.shape, 0, tl.int64) + (words + n.to(tl.int64) * stride).to(tl.int64)
        tl.inline_asm_elementwise(
            _ASK_ASM, "=r,r,l,r", [asks.to(tl.int32), at, size * 4], tl.int32, False, 1
        )


@triton.jit
def _scales(scale, groups, n, N, group, there, ZERO: tl.constexpr, GATED: tl.constexpr):
    """Scales of groups of outputs n, as they are stored."""
    at = _of_matrix(n, N, GATED)[None, :, None, None, None] * groups + group
    return _stored(scale, at, there & (n < N)[None, :, None, None, None], ZERO)


@triton.jit
def row_dot(
    x, words, scale, bias, add, norm, out, N, groups, word_stride, eps, tiles,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, ZERO: tl.constexpr,
    BLOCK_W: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr, NORM: tl.constexpr,
    BIAS: tl.constexpr, ADD: tl.constexpr, GATED: tl.constexpr, ASM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of 8 outputs, every so many programs; else as `one_row`. AHEAD: tiles that come
    to the L2 cache besides the one that comes to registers (Hopper), none of gates and ups."""
    release(PDL)
    SETS: tl.constexpr = BLOCK_W // (64 * WARPS)
    EVEN: tl.constexpr = WORDS == BLOCK_W and WORDS * 8 == K
    dtype: tl.constexpr = x.dtype.element_ty
    first, step = tl.program_id(0), tl.num_programs(0)
    outs = tl.arange(0, 8)
    j, k = _places(outs, SETS, WARPS)
    group, there = _groups(K, G, SETS, WARPS)
    n = first * 8 + outs
    tile = _words(words, word_stride, n, N, j, WORDS, BLOCK_W, GATED)
    stored = _scales(scale, groups, n, N, group, there, ZERO, GATED)
    for i in tl.static_range(AHEAD):
        _ask(words, word_stride, (first + step * (i + 1)) * 8, N, WORDS, WARPS, ASM)
    gain = 1.0
    if NORM:
        gain = _load(norm + k, k < K, EVEN)
    wait(PDL)
    row, square = _of_x(x, k, gain, K, NORM, EVEN)
    length = 1.0
    if NORM:
        length = tl.rsqrt(square / K + eps)
    middle = tl.full([8, WARPS, 4 * SETS, 16], -0x77777778, tl.int32)  # 8 in each field
    much = _sums(middle, row, SETS, dtype, ASM)
    whole = much * (1 / (128.0 + 8.0) if dtype == tl.bfloat16 else 1 / (1024.0 + 8.0))
    for t in range(first, tiles, step):
        n = t * 8 + outs
        more = tl.zeros([8], tl.float32)
        if BIAS:
            more += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if ADD:
            more += tl.load(add + n, mask=n < N, other=0.0).to(tl.float32)
        later = n + step * 8
        if AHEAD:
            _ask(words, word_stride, (t + step * (AHEAD + 1)) * 8, N, WORDS, WARPS, ASM)
        sums = _sums(tile, row, SETS, dtype, ASM)
        tile = _words(words, word_stride, later, N, j, WORDS, BLOCK_W, GATED)
        factor, offset = _grid(stored, dtype, ZERO)
        sums = (sums - much - offset * whole) * factor
        stored = _scales(scale, groups, later, N, group, there, ZERO, GATED)
        y = tl.sum(tl.sum(tl.sum(tl.sum(sums, 4), 3), 0), 1) * length + more
        if GATED != "":
            one = tl.arange(0, 1)[:, None]
            _finish_gated(y[None, :], one, n[None, :], out, 1, N, 0, GATED)
        else:
            tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)
