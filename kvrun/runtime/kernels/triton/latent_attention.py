"""Attention over a latent cache in Triton; twin: kernels/latent_attention.py.

A tile of keys is loaded once and serves twice: as keys for all heads of the tile, and, its latent
part, as their values. Rows of a tile are queries times 16 heads. Few sequences are cut into even
parts of their keys, put together by a second launch in a fixed order.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.latent_attention import Options
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait
from kvrun.runtime.kernels.triton._prefill import _sequence
from kvrun.runtime.kernels.triton._softmax import LOG2E, absorb, begin, pages_of, product, rows_of

__all__ = ["Options", "decode", "prefill"]

_HEADS = 16  # of a tile: the least rows that tensor cores multiply
_PROGRAMS = 264  # about how many should have work
_MOST_PARTS = 64


class Tiling(NamedTuple):
    """How the work is cut."""

    queries: int  # of a tile
    keys: int
    warps: int
    stages: int
    parts: int = 1  # of a sequence's keys; more than one for single queries only


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    keys = 16 if q.dtype is torch.float32 else 32
    most = min(_MOST_PARTS, block_tables.shape[1] * options.block_size // keys)
    programs = len(q) * triton.cdiv(q.shape[1], _HEADS)
    parts = max(1, min(most, _PROGRAMS // max(programs, 1)))
    # Powers of two, so that few forms are compiled.
    tiling = Tiling(1, keys, warps=4, stages=2, parts=1 << (parts.bit_length() - 1))
    return launch(q, cache, block_tables, None, context_lens, options, out, tiling)


def prefill(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    tiling = Tiling(4, 32, warps=8, stages=2)
    if q.dtype is torch.float32:
        tiling = Tiling(1, 16, warps=4, stages=1)
    return launch(q, cache, block_tables, cu_seqlens, context_lens, options, out, tiling)


def launch(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    context_lens: torch.Tensor,
    options: Options,
    out: torch.Tensor | None,
    tiling: Tiling,
) -> torch.Tensor:
    tokens, heads, width = q.shape
    batch, latent, parts = len(context_lens), options.latent, tiling.parts
    if out is None:
        out = torch.empty((tokens, heads * latent), dtype=q.dtype, device=q.device)
    tiles = batch if cu_seqlens is None else tokens // tiling.queries + batch + 1
    kept = None
    if parts > 1:
        count = batch * parts * heads * (latent + 1)
        kept = torch.empty(count, dtype=torch.float32, device=q.device)
    shape = {"HEADS": heads, "LATENT": latent, "WIDE": triton.next_power_of_2(latent)}
    rotated = width - latent
    _attend[(triton.cdiv(heads, _HEADS), tiles, parts)](
        q,
        cache,
        block_tables,
        cu_seqlens,
        context_lens,
        out,
        kept,
        *q.stride()[:2],
        block_tables.stride(0),
        out.stride(0),
        batch,
        tokens,
        UNIT=LOG2E.value * options.scale,
        GROUP=_HEADS,
        QUERIES=tiling.queries,
        ROTATED=rotated,
        NARROW=max(16, triton.next_power_of_2(rotated)),
        BLOCK_SIZE=options.block_size,
        KEYS=tiling.keys,
        PARTS=parts,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
        **shape,
        **overlap(q.device),
    )
    if kept is not None:
        _join[(heads, batch)](
            kept, out, out.stride(0), batch, PARTS=parts, num_warps=4, **shape, **overlap(q.device)
        )
    return out


@triton.jit(
    do_not_specialize=["table_stride", "batch", "tokens"],
    do_not_specialize_on_alignment=["tables_at", "starts_at", "lengths_at"],
)
def _attend(
    q_at, cache_at, tables_at, starts_at, lengths_at, out_at, parts_at,
    q_stride, q_head, table_stride, out_stride, batch, tokens,
    UNIT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, QUERIES: tl.constexpr,
    LATENT: tl.constexpr, WIDE: tl.constexpr, ROTATED: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """QUERIES queries of one sequence for GROUP heads, over one part of the keys they see."""
    wait(PDL)
    release(PDL)
    tile, part = tl.num_programs(1) - 1 - tl.program_id(1), tl.program_id(2)
    if starts_at is None:
        sequence, start, stop, query = tile, tile, tile + 1, 0
    else:
        sequence = _sequence(starts_at, tile, batch, QUERIES)
        start = tl.load(starts_at + sequence)
        stop = tl.load(starts_at + sequence + 1, mask=sequence < batch, other=0)
        stop = tl.where(sequence < batch, stop, tokens)
        query = (tile - start // QUERIES - sequence) * QUERIES
        if query >= stop - start:
            return
    length = tl.load(lengths_at + sequence, mask=sequence < batch, other=0)
    rows = tl.arange(0, QUERIES * GROUP)
    heads, queries = tl.program_id(0) * GROUP + rows % GROUP, query + rows // GROUP
    real = (queries < stop - start) & (heads < HEADS)
    places = (start + queries).to(tl.int64) * q_stride + heads * q_head
    q = rows_of(q_at, places, 1, real, LATENT, WIDE)
    rotated = rows_of(q_at + LATENT, places, 1, real, ROTATED, NARROW)
    before = length - (stop - start)
    end = before + tl.minimum(query + QUERIES, stop - start)
    share = tl.cdiv(tl.cdiv(end, PARTS), KEYS) * KEYS
    top, total, acc = _walk(
        q, rotated, cache_at, tables_at + sequence.to(tl.int64) * table_stride,
        part * share, tl.minimum((part + 1) * share, end), before + queries, heads,
        UNIT, LATENT, WIDE, ROTATED, NARROW, BLOCK_SIZE, KEYS,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    acc = acc / total[:, None]
    columns = tl.arange(0, WIDE)
    inside = real[:, None] & (columns < LATENT)[None, :]
    if PARTS == 1:
        places = (start + queries).to(tl.int64) * out_stride + heads * LATENT
        places = out_at + places[:, None] + columns[None, :]
        tl.store(places, acc.to(out_at.dtype.element_ty), mask=inside)
    else:
        mine = (sequence * PARTS + part) * HEADS + heads
        places = parts_at + mine.to(tl.int64)[:, None] * LATENT + columns[None, :]
        tl.store(places, acc, mask=inside)
        sums_at = parts_at + batch.to(tl.int64) * PARTS * HEADS * LATENT
        tl.store(sums_at + mine, top + tl.log2(total), mask=real)


@triton.jit
def _walk(
    q, rotated, cache_at, table_at, first, end, positions, heads,
    UNIT: tl.constexpr, LATENT: tl.constexpr, WIDE: tl.constexpr, ROTATED: tl.constexpr,
    NARROW: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keys from `first` to `end`, tile by tile; pages are looked up one tile ahead."""
    top, total = begin(None, heads, heads >= 0, True)
    acc = tl.zeros([q.shape[0], WIDE], tl.float32)
    pages = pages_of(table_at, first + tl.arange(0, KEYS), end, BLOCK_SIZE)
    for start in range(first, end, KEYS):
        tokens = start + tl.arange(0, KEYS)
        seen = tokens < end
        slots = pages.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        pages = pages_of(table_at, tokens + KEYS, end, BLOCK_SIZE)
        keys = rows_of(cache_at, slots, LATENT + ROTATED, seen, LATENT, WIDE).to(q.dtype)
        turned = rows_of(cache_at + LATENT, slots, LATENT + ROTATED, seen, ROTATED, NARROW).to(
            q.dtype
        )
        scores = product(q, tl.trans(keys), tl.zeros([q.shape[0], KEYS], tl.float32))
        scores = product(rotated, tl.trans(turned), scores)
        visible = (tokens[None, :] <= positions[:, None]) & seen[None, :]
        scores = tl.where(visible, scores, float("-inf"))
        top, total, acc = absorb(scores, keys, top, total, acc, UNIT)
    return top, total, acc


@triton.jit(do_not_specialize=["batch"])
def _join(
    parts_at, out_at, out_stride, batch, HEADS: tl.constexpr, LATENT: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The parts of one sequence and head, weighed by their sums."""
    wait(PDL)
    release(PDL)
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, WIDE)
    first = row * PARTS * HEADS + head
    sums_at = parts_at + batch.to(tl.int64) * PARTS * HEADS * LATENT
    top = tl.max(tl.load(sums_at + first + tl.arange(0, PARTS) * HEADS), 0)
    total = 0.0
    acc = tl.zeros([WIDE], tl.float32)
    for part in range(PARTS):
        mine = first + part * HEADS
        weight = tl.exp2(tl.load(sums_at + mine) - top)
        found = tl.load(parts_at + mine * LATENT + columns, mask=columns < LATENT, other=0.0)
        total += weight
        acc += weight * found
    places = out_at + row * out_stride + head * LATENT + columns
    tl.store(places, (acc / total).to(out_at.dtype.element_ty), mask=columns < LATENT)
