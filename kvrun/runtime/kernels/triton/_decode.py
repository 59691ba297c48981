"""One query per sequence: keys are cut into parts of equal work, for however many sequences.

The grid is fixed and the lengths are known to the device alone, so each program works out from all
lengths which part of which sequence is its own. Parts are as long as an even share of all keys, so
that a short sequence is one part, and a long one among many does not hold up the rest. A sequence
of several parts is put together by whichever of its programs ends last, always in the same order.

What the kernel in front makes of a sequence is its newest token alone. So where this kernel also
rotates and stores that one, all else that a first tile needs is read while the other still runs.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.paged_attention import Options
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.triton._newest import norms_of, take_in
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait
from kvrun.runtime.kernels.triton._parts import finish, part_of, unseen
from kvrun.runtime.kernels.triton._softmax import (
    LOG2E,
    absorb,
    begin,
    logits,
    pages_of,
    product,
    rows_of,
    slopes_of,
)

# Lengths are scanned by this many at least: one form of the kernel serves most batches.
_SCAN = 256
# When a tile that is read early is taken in: before the others, which are pipelined, after them, or
# each tile is read like it, while the one in front of it is taken in.
BEFORE, AFTER, EACH = "before", "after", "each"
_BEFORE, _AFTER, _EACH = tl.constexpr(BEFORE), tl.constexpr(AFTER), tl.constexpr(EACH)


class Tiling(NamedTuple):
    """How the work is cut."""

    keys: int  # of a tile, and at least of a part
    warps: int
    stages: int
    programs: int  # about how many should have work, beyond one per sequence and kv head
    early: str = EACH  # where the newest token is not stored yet: what becomes of the first tile


class Newest(NamedTuple):
    """Keys and values of the newest tokens, which are not in the cache yet."""

    rotation: Rotation  # with angles
    slots: torch.Tensor  # [sequences] int64


def launch(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    out: torch.Tensor,
    tiling: Tiling,
    newest: Newest | None = None,
) -> None:
    """With `newest`, q [sequences, heads, head_dim] are the first heads of its [q; k; v]."""
    batch, heads, dim = q.shape
    kv_heads, pages = options.kv_heads, block_tables.shape[1]
    target = max(1, tiling.programs // kv_heads)
    longest = triton.cdiv(pages * options.block_size, tiling.keys)
    items = min(batch + target, batch * longest)
    parts = torch.empty(items * heads * (dim + 1), dtype=torch.float32, device=q.device)
    bend = options.softcap is not None or options.alibi is not None
    rotation, slots = (Rotation(), None) if newest is None else newest
    share = heads // options.kv_heads
    group, padded = triton.next_power_of_2(share), triton.next_power_of_2(dim)
    shape: dict[str, Any] = {
        "KV_HEADS": kv_heads, "SHARE": share, "GROUP": group, "ROWS": max(16, group),
        "DIM": dim, "PADDED": padded, "BLOCK_SIZE": options.block_size, "KEYS": tiling.keys,
        "BATCH": 1 if batch == 1 else max(_SCAN, triton.next_power_of_2(batch)),
        "AT_ONCE": min(16, max(1, 4096 // (group * padded))),
    }  # fmt: skip
    _decode[(kv_heads, items)](
        q, cache, block_tables, context_lens, options.alibi, options.sinks, out, parts,
        _counters(q.device, batch * kv_heads), slots, rotation.cos, rotation.sin,
        rotation.q_weight, rotation.k_weight, *q.stride()[:2], block_tables.stride(0),
        out.stride(0), batch, target, rotation.eps,
        SCALE=options.scale, UNIT=LOG2E.value * (1.0 if bend else options.scale),
        SOFTCAP=options.softcap, WINDOW=options.window, CHUNK=options.chunk,
        EARLY=None if newest is None else tiling.early, HALF=rotation.half,
        INTERLEAVED=rotation.interleaved, num_warps=tiling.warps, num_stages=tiling.stages,
        **shape, **overlap(q.device),
    )  # fmt: skip


def _counters(device: torch.device, count: int) -> torch.Tensor:
    return _zeros(device, max(4096, triton.next_power_of_2(count)))


@cache
def _zeros(device: torch.device, count: int) -> torch.Tensor:
    """Arrivals per sequence and kv head; whoever arrives last sets them to zero again."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("run attention once before it is captured: its counters must exist")
    return torch.zeros(count, dtype=torch.int32, device=device)


@triton.jit(
    do_not_specialize=["table_stride", "batch", "target", "eps"],
    do_not_specialize_on_alignment=["tables_at", "lengths_at", "slots_at"],
)
def _decode(
    q_at, cache_at, tables_at, lengths_at, alibi_at, sinks_at, out_at, parts_at, counters_at,
    slots_at, cos_at, sin_at, q_norm_at, k_norm_at,
    q_stride, q_head, table_stride, out_stride, batch, target, eps,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, BATCH: tl.constexpr,
    KEYS: tl.constexpr, AT_ONCE: tl.constexpr, CHUNK: tl.constexpr, EARLY: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A part of a sequence for the `SHARE` heads of a kv head, which are the rows of a tile.

    Lengths, tables and slots are a whole step's, keys and values of earlier tokens are earlier
    steps', written before kernels that do not overlap: all that can be is read before the wait.
    """
    kv, item, items = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    NEW: tl.constexpr = 0 if EARLY is None else 1
    row, part, count, share, length = part_of(
        lengths_at, item, batch, target, WINDOW, CHUNK, KEYS, BATCH, NEW
    )
    if row >= batch:
        return
    first = part * share + unseen(length, WINDOW, CHUNK)
    end = tl.minimum(first + share, length - NEW)
    tables_at += row.to(tl.int64) * table_stride
    cache_at += kv * DIM
    tokens = first + tl.arange(0, KEYS)
    pages = pages_of(tables_at, tokens, end, BLOCK_SIZE)
    keys, values, slot, norms = None, None, None, None
    if EARLY is not None:
        slot = tl.load(slots_at + row)
        norms = norms_of(q_norm_at, k_norm_at, DIM, PADDED, HALF, INTERLEAVED)
        pages = _all_there(pages, PDL)
        keys, values = _tile(cache_at, pages, tokens, end, KV_HEADS, DIM, PADDED, BLOCK_SIZE)
        pages = pages_of(tables_at, tokens + KEYS, end, BLOCK_SIZE)
    wait(PDL)
    release(PDL)
    group = tl.arange(0, ROWS)
    slopes = slopes_of(alibi_at, kv * SHARE + group, group < SHARE)
    top, total = begin(sinks_at, kv * SHARE + group, group < SHARE, part == 0)
    q_at += row.to(tl.int64) * q_stride
    if EARLY is None:
        q = rows_of(q_at + kv * SHARE * q_head, group, q_head, group < SHARE, DIM, PADDED)
        acc = tl.zeros([ROWS, PADDED], tl.float32)
    else:
        q, top, total, acc = take_in(
            q_at + kv * SHARE * q_head, q_at + (KV_HEADS * SHARE + kv) * q_head, q_head,
            cos_at, sin_at, row.to(tl.int64) * HALF, norms, eps, cache_at, slot,
            (part == count - 1) & (length > 0), top, total, slopes, SCALE, UNIT, SOFTCAP,
            KV_HEADS, SHARE, ROWS, DIM, PADDED, HALF, INTERLEAVED, q_norm_at is not None,
        )  # fmt: skip
    top, total, acc = _others(
        q, top, total, acc, keys, values, pages, cache_at, tables_at, first, end,
        group * 0 + (length - 1), slopes,
        SCALE, UNIT, SOFTCAP, KV_HEADS, DIM, PADDED, BLOCK_SIZE, KEYS, EARLY,
    )  # fmt: skip
    finish(
        acc, top, total, parts_at, counters_at, out_at + row.to(tl.int64) * out_stride,
        row, part, count, item, items, kv, KV_HEADS, SHARE, GROUP, ROWS, DIM, PADDED, AT_ONCE,
    )  # fmt: skip


@triton.jit
def _all_there(pages, PDL: tl.constexpr):
    """The same pages, loaded before any is used: each is the larger of itself and the smallest of a
    thread's, which a compiler does not know. Else it waits for one at a time, to save registers."""
    if PDL:
        pages = tl.inline_asm_elementwise(
            "{ .reg .s32 m; min.s32 m, $8, $9; min.s32 m, m, $10; min.s32 m, m, $11; "
            "min.s32 m, m, $12; min.s32 m, m, $13; min.s32 m, m, $14; min.s32 m, m, $15; "
            "max.s32 $0, $8, m; max.s32 $1, $9, m; max.s32 $2, $10, m; max.s32 $3, $11, m; "
            "max.s32 $4, $12, m; max.s32 $5, $13, m; max.s32 $6, $14, m; max.s32 $7, $15, m; }",
            "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r",
            [pages],
            dtype=tl.int32,
            is_pure=True,
            pack=8,
        )
    return pages


@triton.jit
def _tile(
    cache_at, pages, tokens, end,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Keys and values [KEYS, PADDED] of tokens as they are stored, zeros from `end` on."""
    slots = pages.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
    stride: tl.constexpr = 2 * KV_HEADS * DIM
    keys = rows_of(cache_at, slots, stride, tokens < end, DIM, PADDED)
    values = rows_of(cache_at + KV_HEADS * DIM, slots, stride, tokens < end, DIM, PADDED)
    return keys, values


@triton.jit
def _take(
    q, keys, values, tokens, end, top, total, acc, positions, slopes,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """A tile of keys and values in the running softmax; all before `end` are visible."""
    zeros = tl.zeros([q.shape[0], tokens.shape[0]], tl.float32)
    scores = product(q, tl.trans(keys.to(q.dtype)), zeros)
    scores = logits(scores, tokens, positions, slopes, SCALE, SOFTCAP)
    scores = tl.where((tokens < end)[None, :], scores, float("-inf"))
    return absorb(scores, values.to(q.dtype), top, total, acc, UNIT)


@triton.jit
def _others(
    q, top, total, acc, keys, values, pages, cache_at, tables_at, first, end, positions, slopes,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """All keys from `first` to `end`. EARLY, a first tile is there; `pages` are of the next one."""
    if EARLY == _EACH:
        top, total, acc = _carry(
            q, top, total, acc, keys, values, pages, cache_at, tables_at, first, end, positions,
            slopes, SCALE, UNIT, SOFTCAP, KV_HEADS, DIM, PADDED, BLOCK_SIZE, KEYS,
        )  # fmt: skip
    else:
        tokens = first + tl.arange(0, KEYS)
        if EARLY == _BEFORE:
            top, total, acc = _take(
                q, keys, values, tokens, end, top, total, acc, positions, slopes,
                SCALE, UNIT, SOFTCAP,
            )  # fmt: skip
        top, total, acc = _walk(
            q, top, total, acc, pages, cache_at, tables_at,
            first if EARLY is None else first + KEYS, end, positions, slopes,
            SCALE, UNIT, SOFTCAP, KV_HEADS, DIM, PADDED, BLOCK_SIZE, KEYS,
        )  # fmt: skip
        if EARLY == _AFTER:
            top, total, acc = _take(
                q, keys, values, tokens, end, top, total, acc, positions, slopes,
                SCALE, UNIT, SOFTCAP,
            )  # fmt: skip
    return top, total, acc


@triton.jit
def _walk(
    q, top, total, acc, pages, cache_at, tables_at, first, end, positions, slopes,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """All keys from `first` to `end`, tile by tile. `pages`: of the first; of each other one they
    are looked up one tile before they are read."""
    for start in range(first, end, KEYS):
        tokens = start + tl.arange(0, KEYS)
        keys, values = _tile(cache_at, pages, tokens, end, KV_HEADS, DIM, PADDED, BLOCK_SIZE)
        pages = pages_of(tables_at, tokens + KEYS, end, BLOCK_SIZE)
        top, total, acc = _take(
            q, keys, values, tokens, end, top, total, acc, positions, slopes, SCALE, UNIT, SOFTCAP
        )
    return top, total, acc


@triton.jit
def _carry(
    q, top, total, acc, keys, values, pages, cache_at, tables_at, first, end, positions, slopes,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """`_walk` whose first tile is there, with the second's pages; each is read into registers while
    the one in front of it is taken in."""
    for start in range(first, end, KEYS):
        tokens = start + tl.arange(0, KEYS)
        later = tokens + KEYS
        next_keys, next_values = _tile(
            cache_at, pages, later, end, KV_HEADS, DIM, PADDED, BLOCK_SIZE
        )
        pages = pages_of(tables_at, later + KEYS, end, BLOCK_SIZE)
        top, total, acc = _take(
            q, keys, values, tokens, end, top, total, acc, positions, slopes, SCALE, UNIT, SOFTCAP
        )
        keys, values = next_keys, next_values
    return top, total, acc
