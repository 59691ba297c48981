"""`_lora_expand.py` for many adapters at once: a program goes through several tiles of one B.

What it has to look up (its tile, its adapter, what `_shrink` has left) it looks up once; the first
tile of B is loaded before it waits for the product, and while one is stored the next is on its way.
"""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._lora_expand import _collect, _dot, _expand_rows
from kvrun.runtime.kernels.triton._overlap import release, wait


@triton.jit(do_not_specialize=["count", "width", "pieces", "room", "spots"])
def _expand_stream(
    sums, y, arena, table, rows, tiles, places, room, spots,
    count, y_stride, table_stride, width, pieces, per_feature, eps,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    COUNTED: tl.constexpr, TURNS: tl.constexpr, THREADS: tl.constexpr,
    NORM: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one tile of rows, TURNS times BLOCK_N outputs of one part; a share where tiles are few.

    THREADS (or 0) ask for its tiles of B behind the first into L2, before it waits.
    """
    release(PDL)
    program, share = tl.program_id(0), 1
    if TURNS > 1:
        every = tl.arange(0, COUNTED)
        talls = tl.load(tiles + 3 * every + 2, mask=every < room, other=0)
        live = tl.sum((talls > 0).to(tl.int32), 0)
        if room <= COUNTED:
            while share < TURNS and 2 * share * live <= room:
                share *= 2
            if program >= live * spots * share:
                wait(PDL)  # a kernel that waits for nobody would let the next one start too early
                return
    tile, spot = program // (spots * share), program % (spots * share)
    place = places + 4 * (spot // share)
    slot = tl.load(tiles + 3 * tile)
    part, n0, out, column = (
        tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    )  # fmt: skip
    n0 += spot % share * (TURNS // share * BLOCK_N)
    if ALIGNED:
        n0, out, column = tl.multiple_of(n0, 8), tl.multiple_of(out, 8), tl.multiple_of(column, 8)
    turns = tl.minimum(TURNS // share, tl.cdiv(out - n0, BLOCK_N))
    entry = table + slot.to(tl.int64) * table_stride + 2 + 3 * part
    rank = tl.load(entry + 2).to(tl.int32)
    if rank == 0 or turns <= 0:
        wait(PDL)
        return
    first, tall = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    b_at = arena + tl.multiple_of(tl.load(entry), 8)
    begin = tl.load(entry + 1).to(tl.int32)
    if rank > BLOCK_R:
        _expand_rows(
            sums, y, b_at, rows, n0, turns, first, tall, rank, begin, column, out, count, y_stride,
            width, pieces, per_feature, eps, CHUNK, BLOCK_M, BLOCK_N, BLOCK_R, NORM, WIDE, PDL,
        )  # fmt: skip
        return
    if THREADS > 0 and ALIGNED:
        _ask(b_at, n0 + BLOCK_N, tl.minimum(n0 + turns * BLOCK_N, out), out, rank, BLOCK_R, THREADS)
    if tall == 1:
        _stream_row(
            sums, y, b_at, rows, n0, turns, first, rank, begin, column, out, count, y_stride,
            width, pieces, per_feature, eps, CHUNK, BLOCK_N, BLOCK_R, TURNS, NORM, PDL,
        )  # fmt: skip
    else:
        _stream_rows(
            sums, y, b_at, rows, n0, turns, first, tall, rank, begin, column, out, count, y_stride,
            width, pieces, per_feature, eps, CHUNK, BLOCK_M, BLOCK_N, BLOCK_R, TURNS, NORM, WIDE,
            PDL,
        )  # fmt: skip


@triton.jit
def _stream_rows(
    sums, y, b_at, rows, n0, turns, first, tall, rank, begin, column, out, count, y_stride, width,
    pieces, per_feature, eps, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, TURNS: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Several rows, by tensor cores."""
    SOME: tl.constexpr = min(CHUNK, 16)  # 32 pieces of several rows are more than registers
    m, r, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R), n0 + tl.arange(0, BLOCK_N)
    alive, there = (m < tall)[:, None], (r < rank)[:, None]
    b_at += r[:, None] * out + n[None, :]
    b = tl.load(b_at, mask=there & (n < out)[None, :], other=0.0)
    row = tl.load(rows + first + m, mask=m < tall, other=0).to(tl.int64)
    sums += (first + m)[:, None].to(tl.int64) * width
    y_at = y + row[:, None] * y_stride + column + n[None, :]
    wait(PDL)
    before = tl.load(y_at, mask=alive & (n < out)[None, :], other=0.0)
    mask = alive & (r < rank)[None, :]
    low = _collect(sums + (begin + r)[None, :], mask, count * width, pieces, SOME)
    if NORM:
        square = _collect(sums + width - 1, alive, count * width, pieces, SOME)
        low *= tl.rsqrt(square * per_feature + eps)
    low = low.to(b_at.dtype.element_ty)
    for turn in range(turns if TURNS > 1 else 1):
        at = turn * BLOCK_N
        change = _dot(low, tl.trans(b), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), WIDE)
        after = (before.to(tl.float32) + change).to(y.dtype.element_ty)
        if TURNS > 1:  # the next tile is on its way while this one is stored
            later = at + BLOCK_N + n < tl.where(turn + 1 < turns, out, 0)
            b = tl.load(b_at + at + BLOCK_N, mask=there & later[None, :], other=0.0)
            before = tl.load(y_at + at + BLOCK_N, mask=alive & later[None, :], other=0.0)
        tl.store(y_at + at, after, mask=alive & (at + n < out)[None, :])


@triton.jit
def _stream_row(
    sums, y, b_at, rows, n0, turns, first, rank, begin, column, out, count, y_stride, width,
    pieces, per_feature, eps, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    TURNS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row, by multiply and add."""
    r, n, piece = tl.arange(0, BLOCK_R), n0 + tl.arange(0, BLOCK_N), tl.arange(0, CHUNK)
    there = (r < rank)[:, None]
    b_at += r[:, None] * out + n[None, :]
    b = tl.load(b_at, mask=there & (n < out)[None, :], other=0.0)
    row = tl.load(rows + first).to(tl.int64)
    sums += first.to(tl.int64) * width
    y_at = y + row * y_stride + column + n
    wait(PDL)
    # All loads before the first sum, which waits for its own, and what is behind it for that.
    before = tl.load(y_at, mask=n < out, other=0.0)
    low, square = tl.zeros([BLOCK_R], tl.float32), 0.0
    for p0 in range(0, pieces, CHUNK):
        inside, at = p0 + piece < pieces, (p0 + piece).to(tl.int64) * count * width
        part = tl.load(
            sums + (begin + r)[None, :] + at[:, None],
            mask=(r < rank)[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        if NORM:
            square += tl.sum(tl.load(sums + width - 1 + at, mask=inside, other=0.0))
        low += tl.sum(part, 0)
    if NORM:
        low *= tl.rsqrt(square * per_feature + eps)
    low = low.to(b_at.dtype.element_ty).to(tl.float32)
    for turn in range(turns if TURNS > 1 else 1):
        at = turn * BLOCK_N
        after = before.to(tl.float32) + tl.sum(low[:, None] * b.to(tl.float32), 0)
        if TURNS > 1:
            later = at + BLOCK_N + n < tl.where(turn + 1 < turns, out, 0)
            b = tl.load(b_at + at + BLOCK_N, mask=there & later[None, :], other=0.0)
            before = tl.load(y_at + at + BLOCK_N, mask=later, other=0.0)
        tl.store(y_at + at, after.to(y.dtype.element_ty), mask=at + n < out)


@triton.jit
def _ask(b_at, begin, end, stride, rank, BLOCK_R: tl.constexpr, THREADS: tl.constexpr):
    """Asks for columns of `rank` rows into L2, if there are any, a thread for each row."""
    share: tl.constexpr = THREADS // BLOCK_R
    thread = tl.arange(0, THREADS)
    row = thread // share
    at = (b_at + row.to(tl.int64) * stride + begin).to(tl.int64)
    size = (end - begin) * (b_at.dtype.element_ty.primitive_bitwidth // 8)
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.s32 p, $2, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
        "=r,l,r,r",
        [
            at, tl.where((row < rank) & (begin < end), thread % share, 1),
            tl.zeros([THREADS], tl.int32) + size,
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )  # fmt: skip
