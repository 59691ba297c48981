"""How `_decode.py` shares out keys: which program has which part of which sequence, and how the
parts of a sequence are put together again."""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._softmax import begin


@triton.jit
def unseen(lengths, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """How many of the first keys the last one does not see."""
    hidden = lengths * 0
    if WINDOW is not None:
        hidden = tl.maximum(lengths - WINDOW, 0)
    if CHUNK is not None:
        hidden = tl.maximum(hidden, tl.maximum(lengths - 1, 0) // CHUNK * CHUNK)
    return hidden


@triton.jit
def part_of(
    lengths_at, item, batch, target, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    KEYS: tl.constexpr, BATCH: tl.constexpr, NEW: tl.constexpr,
):  # fmt: skip
    """Which part of which row is item number `item`: row, part, parts, keys of a part, length.

    Shared out are the keys that a row's query sees but its last NEW. A row has one part at least.
    No row, `batch` or more, when there are fewer items.
    """
    rows = tl.arange(0, BATCH)
    lengths = tl.load(lengths_at + rows, mask=rows < batch, other=0)
    visible = tl.maximum(lengths - unseen(lengths, WINDOW, CHUNK) - NEW, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(tl.sum(visible, 0), target), KEYS), 1) * KEYS
    parts = tl.where(rows < batch, tl.maximum(tl.cdiv(visible, share), 1), 0)
    if BATCH == 1:
        count, length = tl.sum(parts, 0), tl.sum(lengths, 0)
        row = tl.where(item < count, 0, 1)
        part = item
    else:
        # The last row that ends at or before this item says where the next one begins.
        ends = tl.cumsum(parts, 0)
        before = tl.max(tl.where(ends <= item, ends * (2 * BATCH) + rows + 1, 0), 0)
        row = before % (2 * BATCH)
        part = item - before // (2 * BATCH)
        length = tl.load(lengths_at + row, mask=row < batch, other=0)
        count = tl.maximum(tl.cdiv(length - unseen(length, WINDOW, CHUNK) - NEW, share), 1)
    return row, part, count, share, length


@triton.jit
def finish(
    acc, top, total, parts_at, counters_at, out_at, row, part, count, item, items, kv,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Stores what a sequence of one part has seen. One of several is left for the others of its
    sequence; the last one to come puts them together."""
    group, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    real = group < SHARE
    inside = real[:, None] & (columns < DIM)[None, :]
    places = group[:, None] * DIM + columns[None, :]
    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    out_at += kv * SHARE * DIM
    if count == 1:
        tl.store(out_at + places, acc.to(out_at.dtype.element_ty), mask=inside)
    else:
        mine = (item * KV_HEADS + kv) * SHARE
        sums_at = parts_at + items * KV_HEADS * SHARE * DIM
        tl.store(parts_at + mine * DIM + places, acc, mask=inside)
        tl.store(sums_at + mine + group, top + tl.log2(total), mask=real)
        # Every thread's stores come before the barrier, and that before the release.
        tl.debug_barrier()
        counter_at = counters_at + row * KV_HEADS + kv
        arrived = tl.atomic_add(counter_at, 1, sem="acq_rel", scope="gpu")
        if arrived == count - 1:
            first = (item - part) * KV_HEADS + kv
            _together(
                parts_at, sums_at, out_at, first, count,
                KV_HEADS, SHARE, GROUP, DIM, PADDED, AT_ONCE,
            )  # fmt: skip
            tl.store(counter_at, 0)


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
