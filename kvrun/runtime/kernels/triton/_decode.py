"""One query per sequence: keys are cut into parts of equal work, for however many sequences.

The grid is fixed and the lengths are known to the device alone, so each program works out from all
lengths which part of which sequence is its own. Parts are as long as an even share of all keys, so
that a short sequence is one part, and a long one among many does not hold up the rest. A sequence
of several parts is put together by whichever of its programs ends last, always in the same order.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.paged_attention import Options
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait
from kvrun.runtime.kernels.triton._softmax import (
    LOG2E,
    absorb,
    begin,
    logits,
    pages_of,
    product,
    rows_of,
)

# Lengths are scanned by this many at least: one form of the kernel serves most batches.
_SCAN = 256


class Tiling(NamedTuple):
    """How the work is cut."""

    keys: int  # of a tile, and at least of a part
    warps: int
    stages: int
    programs: int  # about how many should have work, beyond one per sequence and kv head
    ahead: bool = True  # look pages up one tile before they are read
    fused: bool = True  # the last program of a sequence joins its parts, not a second kernel


def launch(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    out: torch.Tensor,
    tiling: Tiling,
) -> None:
    batch, heads, dim = q.shape
    kv_heads, pages = options.kv_heads, block_tables.shape[1]
    target = max(1, tiling.programs // kv_heads)
    longest = triton.cdiv(pages * options.block_size, tiling.keys)
    items = min(batch + target, batch * longest)
    parts = torch.empty(items * heads * (dim + 1), dtype=torch.float32, device=q.device)
    bent = options.softcap is not None or options.alibi is not None
    shape = _shape(q, options, tiling)
    _decode[(kv_heads, items)](
        q,
        cache,
        block_tables,
        context_lens,
        options.alibi,
        options.sinks,
        out,
        parts,
        _counters(q.device, batch * kv_heads) if tiling.fused else None,
        *q.stride()[:2],
        block_tables.stride(0),
        out.stride(0),
        batch,
        target,
        SCALE=options.scale,
        UNIT=LOG2E.value * (1.0 if bent else options.scale),
        SOFTCAP=options.softcap,
        BLOCK_SIZE=options.block_size,
        ROWS=max(16, shape["GROUP"]),
        AHEAD=tiling.ahead,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **shape,
    )
    if not tiling.fused and items > batch:
        _join[(kv_heads, batch)](
            parts, context_lens, out, out.stride(0), items, batch, target, num_warps=4, **shape
        )


def _shape(q: torch.Tensor, options: Options, tiling: Tiling) -> dict[str, Any]:
    """What both kernels must know alike."""
    batch, heads, dim = q.shape
    share = heads // options.kv_heads
    group, padded = triton.next_power_of_2(share), triton.next_power_of_2(dim)
    return {
        "KV_HEADS": options.kv_heads,
        "SHARE": share,
        "GROUP": group,
        "DIM": dim,
        "PADDED": padded,
        "WINDOW": options.window,
        "CHUNK": options.chunk,
        "KEYS": tiling.keys,
        "BATCH": 1 if batch == 1 else max(_SCAN, triton.next_power_of_2(batch)),
        "AT_ONCE": min(16, max(1, 4096 // (group * padded))),
        **overlap(q.device),
    }


def _counters(device: torch.device, count: int) -> torch.Tensor:
    return _zeros(device, max(4096, triton.next_power_of_2(count)))


@cache
def _zeros(device: torch.device, count: int) -> torch.Tensor:
    """Arrivals per sequence and kv head; whoever arrives last sets them to zero again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run attention once before it is captured: its counters must exist")
    return torch.zeros(count, dtype=torch.int32, device=device)


@triton.jit
def _unseen(lengths, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """How many of the first keys the last one does not see."""
    unseen = lengths * 0
    if WINDOW is not None:
        unseen = tl.maximum(lengths - WINDOW, 0)
    if CHUNK is not None:
        unseen = tl.maximum(unseen, tl.maximum(lengths - 1, 0) // CHUNK * CHUNK)
    return unseen


@triton.jit
def _share(
    lengths, batch, rows, target, WINDOW: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr
):
    """Keys of a part, and the number of parts of each row: at least one, and none for no row."""
    visible = lengths - _unseen(lengths, WINDOW, CHUNK)
    share = tl.cdiv(tl.sum(visible, 0), target)
    share = tl.maximum(tl.cdiv(share, KEYS), 1) * KEYS
    return share, tl.where(rows < batch, tl.maximum(tl.cdiv(visible, share), 1), 0)


@triton.jit
def _part(
    lengths_at, item, batch, target, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Which part of which row is item number `item`: row, part, parts, keys of a part, length.

    No row, `batch` or more, when there are fewer items.
    """
    rows = tl.arange(0, BATCH)
    lengths = tl.load(lengths_at + rows, mask=rows < batch, other=0)
    share, parts = _share(lengths, batch, rows, target, WINDOW, CHUNK, KEYS)
    if BATCH == 1:
        count, length = tl.sum(parts, 0), tl.sum(lengths, 0)
        row = tl.where(item < count, 0, 1)
        part = item
    else:
        row = tl.sum((tl.cumsum(parts, 0) <= item).to(tl.int32), 0)
        part = item - tl.sum(tl.where(rows < row, parts, 0), 0)
        count = tl.sum(tl.where(rows == row, parts, 0), 0)
        length = tl.sum(tl.where(rows == row, lengths, 0), 0)
    return row, part, count, share, length


@triton.jit(
    do_not_specialize=["table_stride", "batch", "target"],
    do_not_specialize_on_alignment=["tables_at", "lengths_at"],
)
def _decode(
    q_at, cache_at, tables_at, lengths_at, alibi_at, sinks_at, out_at, parts_at, counters_at,
    q_stride, q_head, table_stride, out_stride, batch, target,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BATCH: tl.constexpr,
    KEYS: tl.constexpr, AHEAD: tl.constexpr, AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of a sequence for the `SHARE` heads of a kv head, which are the rows of a tile.

    Lengths and tables are those of a whole step, written before kernels that do not overlap: they
    are read, and the part is found, before the wait.
    """
    kv, item, items = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row, part, count, share, length = _part(
        lengths_at, item, batch, target, WINDOW, CHUNK, KEYS, BATCH
    )
    if row >= batch:
        return
    first = part * share + _unseen(length, WINDOW, CHUNK)
    end = tl.minimum(first + share, length)
    tables_at += row.to(tl.int64) * table_stride
    pages = pages_of(tables_at, first + tl.arange(0, KEYS), end, BLOCK_SIZE)
    wait(PDL)
    release(PDL)
    group, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = group < SHARE
    inside = real[:, None] & (columns < DIM)[None, :]
    heads = kv * SHARE + group
    q_at += row.to(tl.int64) * q_stride + kv * SHARE * q_head
    q = tl.load(q_at + group[:, None] * q_head + columns[None, :], mask=inside, other=0.0)
    slopes = None
    if alibi_at is not None:
        slopes = tl.load(alibi_at + heads, mask=real, other=0.0)
    top, total = begin(sinks_at, heads, real, part == 0)
    top, total, acc = _walk(
        q, top, total, cache_at + kv * DIM, tables_at, pages,
        first, end, group * 0 + (length - 1), slopes,
        SCALE, UNIT, SOFTCAP, KV_HEADS, DIM, PADDED, BLOCK_SIZE, KEYS, AHEAD,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if count == 1:
        out_at += row.to(tl.int64) * out_stride + kv * SHARE * DIM
        places = out_at + group[:, None] * DIM + columns[None, :]
        tl.store(places, acc.to(out_at.dtype.element_ty), mask=inside)
    else:
        _leave(
            acc, top, total, parts_at, counters_at, out_at + row.to(tl.int64) * out_stride,
            row, part, count, item, items, kv,
            KV_HEADS, SHARE, GROUP, ROWS, DIM, PADDED, AT_ONCE,
        )  # fmt: skip


@triton.jit
def _leave(
    acc, top, total, parts_at, counters_at, out_at, row, part, count, item, items, kv,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Leaves a part for the others of its sequence; the last one to come puts them together."""
    group, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = group < SHARE
    inside = real[:, None] & (columns < DIM)[None, :]
    mine = (item * KV_HEADS + kv) * SHARE + group
    tl.store(parts_at + mine[:, None] * DIM + columns[None, :], acc, mask=inside)
    sums_at = parts_at + items * KV_HEADS * SHARE * DIM
    tl.store(sums_at + mine, top + tl.log2(tl.where(total > 0, total, 1.0)), mask=real)
    if counters_at is not None:
        # Every thread's stores come before the barrier, and that before the release.
        tl.debug_barrier()
        counter_at = counters_at + row * KV_HEADS + kv
        arrived = tl.atomic_add(counter_at, 1, sem="acq_rel", scope="gpu")
        if arrived == count - 1:
            _together(
                parts_at, sums_at, out_at + kv * SHARE * DIM, (item - part) * KV_HEADS + kv, count,
                KV_HEADS, SHARE, GROUP, DIM, PADDED, AT_ONCE,
            )  # fmt: skip
            tl.store(counter_at, 0)


@triton.jit
def _walk(
    q, top, total, cache_at, table_at, pages, first, end, positions, slopes,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """All keys from `first` to `end`, tile by tile; all are visible. `pages`: of the first tile."""
    acc = tl.zeros([q.shape[0], PADDED], tl.float32)
    for start in range(first, end, KEYS):
        tokens = start + tl.arange(0, KEYS)
        seen = tokens < end
        if not AHEAD:
            pages = pages_of(table_at, tokens, end, BLOCK_SIZE)
        slots = pages.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        if AHEAD:
            pages = pages_of(table_at, tokens + KEYS, end, BLOCK_SIZE)
        keys = rows_of(cache_at, slots, 2 * KV_HEADS * DIM, seen, DIM, PADDED).to(q.dtype)
        scores = product(q, tl.trans(keys), tl.zeros([q.shape[0], KEYS], tl.float32))
        scores = logits(scores, tokens, positions, slopes, SCALE, SOFTCAP)
        scores = tl.where(seen[None, :], scores, float("-inf"))
        values_at = cache_at + KV_HEADS * DIM
        values = rows_of(values_at, slots, 2 * KV_HEADS * DIM, seen, DIM, PADDED).to(q.dtype)
        top, total, acc = absorb(scores, values, top, total, acc, UNIT)
    return top, total, acc


@triton.jit(
    do_not_specialize=["items", "batch", "target"], do_not_specialize_on_alignment=["lengths_at"]
)
def _join(
    parts_at, lengths_at, out_at, out_stride, items, batch, target,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, KEYS: tl.constexpr,
    BATCH: tl.constexpr, AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The parts of a sequence, for the heads of a kv head; nothing to do for a single part."""
    wait(PDL)
    release(PDL)
    kv, row = tl.program_id(0), tl.program_id(1)
    rows = tl.arange(0, BATCH)
    lengths = tl.load(lengths_at + rows, mask=rows < batch, other=0)
    _, parts = _share(lengths, batch, rows, target, WINDOW, CHUNK, KEYS)
    count = tl.sum(tl.where(rows == row, parts, 0), 0)
    first = tl.sum(tl.where(rows < row, parts, 0), 0)
    if count > 1:
        sums_at = parts_at + items * KV_HEADS * SHARE * DIM
        out_at += row.to(tl.int64) * out_stride + kv * SHARE * DIM
        _together(
            parts_at, sums_at, out_at, first * KV_HEADS + kv, count,
            KV_HEADS, SHARE, GROUP, DIM, PADDED, AT_ONCE,
        )  # fmt: skip


@triton.jit
def _together(
    parts_at, sums_at, out_at, first, count,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Weigh `count` parts, every KV_HEADS-th from `first` on, by their sums; AT_ONCE in flight."""
    group, columns = tl.arange(0, GROUP), tl.arange(0, PADDED)
    real = group < SHARE
    inside = real[:, None] & (columns < DIM)[None, :]
    top, total = begin(None, group, real, True)
    acc = tl.zeros([GROUP, PADDED], tl.float32)
    for start in range(0, count, AT_ONCE):
        parts = start + tl.arange(0, AT_ONCE)
        there = parts < count
        rows = (first + parts * KV_HEADS)[:, None] * SHARE + group[None, :]
        mask = there[:, None] & real[None, :]
        # L2 is where another program's stores are; L1 may hold what was there before.
        sums = tl.load(sums_at + rows, mask=mask, other=0.0, cache_modifier=".cg")
        sums = tl.where(there[:, None], sums, float("-inf"))
        places = parts_at + rows[:, :, None] * DIM + columns[None, None, :]
        mask = there[:, None, None] & inside[None, :, :]
        outs = tl.load(places, mask=mask, other=0.0, cache_modifier=".cg")
        now = tl.maximum(top, tl.max(sums, 0))
        weights = tl.exp2(sums - now[None, :])
        fade = tl.exp2(top - now)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade[:, None] + tl.sum(weights[:, :, None] * outs, 0)
        top = now
    places = out_at + group[:, None] * DIM + columns[None, :]
    tl.store(places, (acc / total[:, None]).to(out_at.dtype.element_ty), mask=inside)
