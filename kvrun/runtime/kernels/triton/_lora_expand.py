"""The device's side of `lora.py`, its second half: B times what `_shrink` has left, added to y."""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._overlap import release, wait


@triton.jit
def _dot(x, a, y, WIDE: tl.constexpr):
    """y + x · a transposed"""
    if WIDE:
        x, a = x.to(tl.float32), a.to(tl.float32)
    return tl.dot(x, tl.trans(a), y, input_precision="ieee")


@triton.jit(do_not_specialize=["count", "width", "pieces", "room", "spots"])
def _expand(
    sums, y, arena, table, rows, tiles, places, room, spots,
    count, y_stride, table_stride, width, pieces, per_feature, eps,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NORM: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one tile of rows, BLOCK_N outputs of one part."""
    release(PDL)
    tile, spot = tl.program_id(0) // spots, tl.program_id(0) % spots
    place = places + 4 * spot
    slot = tl.load(tiles + 3 * tile)
    part, n0, out, column = (
        tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    )  # fmt: skip
    if ALIGNED:
        n0, out, column = tl.multiple_of(n0, 8), tl.multiple_of(out, 8), tl.multiple_of(column, 8)
    entry = table + slot.to(tl.int64) * table_stride + 2 + 3 * part
    rank = tl.load(entry + 2).to(tl.int32)
    if rank == 0:
        wait(PDL)  # a kernel that waits for nobody would let the next one start too early
        return
    first, tall = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    b_at = arena + tl.multiple_of(tl.load(entry), 8)
    begin = tl.load(entry + 1).to(tl.int32)
    if tall == 1:
        _expand_row(
            sums, y, b_at, rows, n0 + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R), first, rank,
            begin, column, out, count, y_stride, width, pieces, per_feature, eps,
            CHUNK, BLOCK_N, BLOCK_R, NORM, PDL,
        )  # fmt: skip
    else:
        _expand_rows(
            sums, y, b_at, rows, n0, 1, first, tall, rank, begin, column, out, count, y_stride,
            width, pieces, per_feature, eps, CHUNK, BLOCK_M, BLOCK_N, BLOCK_R, NORM, WIDE, PDL,
        )  # fmt: skip


@triton.jit
def _expand_rows(
    sums, y, b_at, rows, n0, turns, first, tall, rank, begin, column, out, count, y_stride, width,
    pieces, per_feature, eps, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`turns` times BLOCK_N outputs of several rows, by tensor cores."""
    m, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    n = n0 + tl.arange(0, BLOCK_N)
    b_at += r[:, None] * out + n[None, :]
    b = tl.load(b_at, mask=(r < rank)[:, None] & (n < out)[None, :], other=0.0)
    row = tl.load(rows + first + m, mask=m < tall, other=0).to(tl.int64)
    alive = (m < tall)[:, None]
    sums += (first + m)[:, None].to(tl.int64) * width
    low_at = sums + (begin + r)[None, :]
    y_at = y + row[:, None] * y_stride + column + n[None, :]
    wait(PDL)
    scale = tl.full([BLOCK_M, 1], 1.0, tl.float32)
    if NORM:
        square = _collect(sums + width - 1, alive, count * width, pieces, CHUNK)
        scale = tl.rsqrt(square * per_feature + eps)
    for turn in range(turns):
        shift = turn * BLOCK_N
        inside = alive & (shift + n < out)[None, :]
        before = tl.load(y_at + shift, mask=inside, other=0.0)
        change = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for r0 in range(0, rank, BLOCK_R):
            mask = alive & (r0 + r < rank)[None, :]
            low = _collect(low_at + r0, mask, count * width, pieces, CHUNK)
            change = _dot((low * scale).to(b.dtype), tl.trans(b), change, WIDE)
            onward = r0 + BLOCK_R < rank
            next_r = tl.where(onward, r0 + BLOCK_R, 0)
            next_n = tl.where(onward, shift, shift + BLOCK_N)
            later = (next_r + r < rank)[:, None] & (next_n + n < out)[None, :]
            b = tl.load(b_at + next_r * out + next_n, mask=later, other=0.0)
        tl.store(y_at + shift, (before.to(tl.float32) + change).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _expand_row(
    sums, y, b_at, rows, n, r, first, rank, begin, column, out, count, y_stride, width, pieces,
    per_feature, eps, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one row, by multiply and add: there is nothing to share."""
    b_at += r[:, None] * out + n[None, :]
    b = tl.load(b_at, mask=(r < rank)[:, None] & (n < out)[None, :], other=0.0)
    row = tl.load(rows + first).to(tl.int64)
    y_at = y + row * y_stride + column + n
    at = sums + first.to(tl.int64) * width
    piece = tl.arange(0, CHUNK)
    wait(PDL)
    before = tl.load(y_at, mask=n < out, other=0.0).to(tl.float32)
    scale = 1.0
    if NORM:
        square = 0.0
        for p0 in range(0, pieces, CHUNK):
            square += tl.sum(tl.load(
                at + width - 1 + (p0 + piece).to(tl.int64) * count * width,
                mask=p0 + piece < pieces, other=0.0,
            ))  # fmt: skip
        scale = tl.rsqrt(square * per_feature + eps)
    change = tl.zeros([BLOCK_N], tl.float32)
    for r0 in range(0, rank, BLOCK_R):
        low = tl.zeros([BLOCK_R], tl.float32)
        for p0 in range(0, pieces, CHUNK):
            low += tl.sum(tl.load(
                at + (begin + r0 + r)[None, :]
                + (p0 + piece).to(tl.int64)[:, None] * count * width,
                mask=(r0 + r < rank)[None, :] & (p0 + piece < pieces)[:, None], other=0.0,
            ), 0)  # fmt: skip
        low = (low * scale).to(b.dtype).to(tl.float32)
        change += tl.sum(low[:, None] * b.to(tl.float32), 0)
        if r0 + BLOCK_R < rank:  # no mask alone: zeros would need registers beside the old ones
            later = (r0 + BLOCK_R + r < rank)[:, None] & (n < out)[None, :]
            b = tl.load(b_at + (r0 + BLOCK_R) * out, mask=later, other=0.0)
    tl.store(y_at, (before + change).to(y.dtype.element_ty), mask=n < out)


@triton.jit
def _collect(at, mask, stride, count, CHUNK: tl.constexpr):
    """The sum of all pieces, `stride` apart."""
    piece = tl.arange(0, CHUNK)[:, None, None]
    found = tl.zeros([at.shape[0], at.shape[1]], tl.float32)
    for p0 in range(0, count, CHUNK):
        inside = mask[None, :, :] & (p0 + piece < count)
        pieces = tl.load(
            at[None, :, :] + (p0 + piece).to(tl.int64) * stride, mask=inside, other=0.0
        )
        found += tl.sum(pieces, 0)
    return found
