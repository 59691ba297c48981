"""What one decode step takes from the device's state, in Triton: one launch before, one after."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._overlap import overlap, release, wait

if TYPE_CHECKING:
    from kvrun.runtime.kernels.step import State, Step


def prepare(slots: torch.Tensor, state: "State", step: "Step", block_size: int) -> None:
    _prepare[(len(slots),)](
        slots,
        state.last,
        state.lengths,
        state.tables,
        state.temperature,
        state.keys,
        step.ids,
        step.positions,
        step.context_lens,
        step.slot_mapping,
        step.block_tables,
        step.temperature,
        step.keys,
        state.tables.stride(0),
        step.block_tables.stride(0),
        PADDING=len(state.last) - 1,
        BLOCK_SIZE=block_size,
        PAGES=128,
        num_warps=1,
        **overlap(slots.device),
    )


def advance(slots: torch.Tensor, ids: torch.Tensor, state: "State") -> None:
    rows = len(slots)
    _advance[(triton.cdiv(rows, 128),)](
        slots,
        ids,
        state.last,
        state.lengths,
        rows,
        PADDING=len(state.last) - 1,
        BLOCK=128,
        num_warps=4,
        **overlap(slots.device),
    )


@triton.jit
def _prepare(
    slots_at,
    last_at,
    lengths_at,
    tables_at,
    temperature_at,
    keys_at,
    ids_at,
    positions_at,
    context_lens_at,
    slot_mapping_at,
    block_tables_at,
    row_temperature_at,
    row_keys_at,
    tables_stride,
    block_tables_stride,
    PADDING: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    PAGES: tl.constexpr,  # copied at once
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    wait(PDL)
    slot = tl.load(slots_at + row)
    length = tl.where(slot == PADDING, 1, tl.load(lengths_at + slot))
    position = length - 1
    page = position // BLOCK_SIZE
    tables_at += slot.to(tl.int64) * tables_stride
    block_tables_at += row.to(tl.int64) * block_tables_stride
    block = tl.load(tables_at + page).to(tl.int64)
    halves = tl.arange(0, 2)
    key = tl.load(keys_at + slot * 2 + halves)
    tl.store(ids_at + row, tl.load(last_at + slot))
    tl.store(positions_at + row, position.to(tl.int64))
    tl.store(context_lens_at + row, length)
    tl.store(slot_mapping_at + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
    tl.store(row_temperature_at + row, tl.load(temperature_at + slot))
    tl.store(row_keys_at + row * 2 + halves, key)
    for start in range(0, page + 1, PAGES):
        pages = start + tl.arange(0, PAGES)
        blocks = tl.load(tables_at + pages, mask=pages <= page, other=0)
        tl.store(block_tables_at + pages, blocks, mask=pages <= page)
    release(PDL)


@triton.jit(do_not_specialize=["rows"])
def _advance(
    slots_at,
    ids_at,
    last_at,
    lengths_at,
    rows,
    PADDING: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(PDL)
    release(PDL)
    slots = tl.load(slots_at + at, mask=at < rows, other=PADDING)
    real = slots != PADDING
    ids = tl.load(ids_at + at, mask=real, other=0)
    lengths = tl.load(lengths_at + slots, mask=real, other=0)
    tl.store(last_at + slots, ids, mask=real)
    tl.store(lengths_at + slots, lengths + 1, mask=real)
