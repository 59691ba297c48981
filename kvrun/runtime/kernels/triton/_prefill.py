"""Runs of queries: each program takes a tile of one sequence's queries past the keys they see.

The grid is fixed and the lengths are known to the device alone. With tiles of n queries, sequence b
owns the tile numbers from cu_seqlens[b] // n + b on: enough for its queries, and in steps that need
no sums. Rows behind the last sequence are one more sequence, which sees nothing and gets zeros.
"""

from typing import NamedTuple

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
    slopes_of,
)


class Tiling(NamedTuple):
    """How the work is cut."""

    rows: int  # of a tile: queries, or queries times the heads that share keys
    keys: int
    warps: int
    stages: int
    packed: bool  # the heads of a kv head are rows of one tile


def launch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    fresh: bool,
    out: torch.Tensor,
    tiling: Tiling,
) -> None:
    tokens, heads, dim = q.shape
    batch = len(context_lens)
    share = heads // options.kv_heads
    group = share if tiling.packed else 1
    queries = tiling.rows // group
    bent = options.softcap is not None or options.alibi is not None
    _prefill[(heads // group, tokens // queries + batch + 1)](
        q,
        k,
        v,
        cache,
        block_tables,
        cu_seqlens,
        context_lens,
        options.alibi,
        options.sinks,
        out,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        block_tables.stride(0),
        out.stride(0),
        batch,
        tokens,
        SCALE=options.scale,
        UNIT=LOG2E.value * (1.0 if bent else options.scale),
        SOFTCAP=options.softcap,
        WINDOW=options.window,
        CHUNK=options.chunk,
        KV_HEADS=options.kv_heads,
        SHARE=share,
        GROUP=group,
        QUERIES=queries,
        ROWS=tiling.rows,
        DIM=dim,
        PADDED=triton.next_power_of_2(dim),
        BLOCK_SIZE=options.block_size,
        KEYS=tiling.keys,
        FRESH=fresh,
        CAUSAL=options.causal,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **overlap(q.device),
    )


@triton.jit
def _sequence(starts_at, tile, batch, QUERIES: tl.constexpr):
    """The sequence that owns a tile; `batch` is what lies behind the last one."""
    found = 0
    for first in range(0, batch + 1, 128):
        rows = first + tl.arange(0, 128)
        tiles = tl.load(starts_at + rows, mask=rows <= batch, other=0) // QUERIES + rows
        found += tl.sum(((tiles <= tile) & (rows <= batch)).to(tl.int32), 0)
    return found - 1


@triton.jit(
    do_not_specialize=["table_stride", "batch", "tokens"],
    do_not_specialize_on_alignment=["tables_at", "starts_at", "lengths_at"],
)
def _prefill(
    q_at, k_at, v_at, cache_at, tables_at, starts_at, lengths_at, alibi_at, sinks_at, out_at,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, table_stride, out_stride, batch, tokens,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr, FRESH: tl.constexpr, CAUSAL: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of one sequence, for GROUP heads: row r is query r // GROUP, head r % GROUP.

    Late tiles see most keys, so they start first.
    """
    wait(PDL)
    release(PDL)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = _sequence(starts_at, tile, batch, QUERIES)
    start = tl.load(starts_at + sequence)
    stop = tl.load(starts_at + sequence + 1, mask=sequence < batch, other=0)
    stop = tl.where(sequence < batch, stop, tokens)
    length = tl.load(lengths_at + sequence, mask=sequence < batch, other=0)
    query = (tile - start // QUERIES - sequence) * QUERIES
    if query >= stop - start:
        return
    rows, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    head = tl.program_id(0) * GROUP
    heads, queries = head + rows % GROUP, query + rows // GROUP
    real = (queries < stop - start) & (rows < QUERIES * GROUP)
    inside = real[:, None] & (columns < DIM)[None, :]
    places = (start + queries).to(tl.int64)[:, None] * q_stride + heads[:, None] * q_head
    q = tl.load(q_at + places + columns[None, :], mask=inside, other=0.0)
    slopes = slopes_of(alibi_at, heads, real)
    top, total = begin(sinks_at, heads, real, True)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    kv = head // SHARE
    # A stretch of keys is one layout of rows, whether it is the step's own or pages of the cache.
    if FRESH:
        k_at += start.to(tl.int64) * k_stride + kv * k_head
        v_at += start.to(tl.int64) * v_stride + kv * v_head
    else:
        k_at = cache_at + kv * DIM
        v_at = k_at + KV_HEADS * DIM
        k_stride = 2 * KV_HEADS * DIM
        v_stride = 2 * KV_HEADS * DIM
        tables_at += sequence.to(tl.int64) * table_stride
    before, first, last, places = length - (stop - start), query, query + QUERIES, queries
    if not CAUSAL:
        # All stand where the last key does, as the only query would.
        before, first, last, places = length - 1, query * 0, query * 0 + 1, queries * 0
    top, total, acc = _past_keys(
        q, top, total, acc, k_at, v_at, k_stride, v_stride, tables_at, before, first,
        tl.minimum(last, stop - start), places, slopes,
        SCALE, UNIT, SOFTCAP, WINDOW, DIM, PADDED, BLOCK_SIZE, KEYS, FRESH, CHUNK,
    )  # fmt: skip
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    places = (start + queries).to(tl.int64)[:, None] * out_stride + heads[:, None] * DIM
    tl.store(out_at + places + columns[None, :], acc.to(out_at.dtype.element_ty), mask=inside)


@triton.jit
def _past_keys(
    q, top, total, acc, k_at, v_at, k_stride, v_stride, table_at, before, query, stop, queries,
    slopes, SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    FRESH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Keys that all queries see need no mask: only edges and the diagonal do."""
    positions = before + queries
    end = before + stop
    first = 0
    clear = 0
    clear_end = tl.maximum(before + query + 1, 0) // KEYS * KEYS
    if WINDOW is not None or CHUNK is not None:
        if WINDOW is not None:
            first = tl.maximum(before + query + 1 - WINDOW, 0)
            clear = tl.maximum(end - WINDOW, 0)
        if CHUNK is not None:
            first = tl.maximum(first, tl.maximum(before + query, 0) // CHUNK * CHUNK)
            clear = tl.maximum(clear, tl.maximum(end - 1, 0) // CHUNK * CHUNK)
        first = first // KEYS * KEYS
        clear_end = tl.maximum(clear_end, first)
        clear = tl.minimum(tl.maximum(tl.cdiv(clear, KEYS) * KEYS, first), clear_end)
        top, total, acc = _walk(
            q, top, total, acc, k_at, v_at, k_stride, v_stride, table_at, first, clear, end,
            positions, slopes, SCALE, UNIT, SOFTCAP, WINDOW, DIM, PADDED, BLOCK_SIZE, KEYS, FRESH,
            CHUNK, True,
        )  # fmt: skip
    top, total, acc = _walk(
        q, top, total, acc, k_at, v_at, k_stride, v_stride, table_at, clear, clear_end, end,
        positions, slopes, SCALE, UNIT, SOFTCAP, WINDOW, DIM, PADDED, BLOCK_SIZE, KEYS, FRESH,
        CHUNK, False,
    )  # fmt: skip
    return _walk(
        q, top, total, acc, k_at, v_at, k_stride, v_stride, table_at, clear_end, end, end,
        positions, slopes, SCALE, UNIT, SOFTCAP, WINDOW, DIM, PADDED, BLOCK_SIZE, KEYS, FRESH,
        CHUNK, True,
    )  # fmt: skip


@triton.jit
def _walk(
    q, top, total, acc, k_at, v_at, k_stride, v_stride, table_at, first, stop, end, positions,
    slopes, SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr, WINDOW: tl.constexpr,
    DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    FRESH: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys from `first` to `stop`, tile by tile; there are none from `end` on."""
    if not FRESH:
        pages = pages_of(table_at, first + tl.arange(0, KEYS), end, BLOCK_SIZE)
    for start in range(first, stop, KEYS):
        tokens = start + tl.arange(0, KEYS)
        seen = None
        if MASKED:
            seen = tokens < end
        if FRESH:
            places = tokens
        else:
            places = pages.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
            # Looked up one tile before they are read.
            pages = pages_of(table_at, tokens + KEYS, end, BLOCK_SIZE)
        keys = rows_of(k_at, places, k_stride, seen, DIM, PADDED).to(q.dtype)
        scores = product(q, tl.trans(keys), tl.zeros([q.shape[0], KEYS], tl.float32))
        scores = logits(scores, tokens, positions, slopes, SCALE, SOFTCAP)
        if MASKED:
            behind = positions[:, None] - tokens[None, :]
            visible = behind >= 0
            if WINDOW is not None:
                visible &= behind < WINDOW
            if CHUNK is not None:
                visible &= (tokens // CHUNK)[None, :] == (positions // CHUNK)[:, None]
            scores = tl.where(visible, scores, float("-inf"))
        values = rows_of(v_at, places, v_stride, seen, DIM, PADDED).to(q.dtype)
        top, total, acc = absorb(scores, values, top, total, acc, UNIT)
    return top, total, acc
