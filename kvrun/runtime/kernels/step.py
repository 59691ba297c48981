"""The state of running sequences on the device, and what one decode step takes from it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class State:
    """What is known of every running sequence, by slot. The last slot is for padding rows."""

    last: torch.Tensor  # [slots] int64: the newest token, the one to be fed
    lengths: torch.Tensor  # [slots] int32: tokens known, that one included
    tables: torch.Tensor  # [slots, pages] int32: blocks of the cache; those of the last: block 0
    temperature: torch.Tensor  # [slots] fp32; 0: greedy
    keys: torch.Tensor  # [slots, 2] int32 of `noise.keys`


@dataclass(frozen=True)
class Step:
    """One token of each of B rows: the tensors that a captured decode step reads."""

    ids: torch.Tensor  # [B] int64
    positions: torch.Tensor  # [B] int64
    context_lens: torch.Tensor  # [B] int32; also the index of the token that will be drawn
    slot_mapping: torch.Tensor  # [B] int64
    block_tables: torch.Tensor  # [B, pages] int32; behind the context's end anything may stand
    temperature: torch.Tensor  # [B] fp32
    keys: torch.Tensor  # [B, 2] int32


def prepare(slots: torch.Tensor, state: State, step: Step, block_size: int) -> None:
    """Fill `step` with the rows `slots` [B] int32 of `state`.

    Both tables have the same number of pages. A padding row feeds position 0 of its sequence.
    """
    at = slots.long()
    lengths = state.lengths[at].masked_fill_(at == len(state.last) - 1, 1)
    positions = lengths.long() - 1
    tables = state.tables[at]
    pages, offsets = positions // block_size, positions % block_size
    blocks = tables.gather(1, pages[:, None])[:, 0].long()
    step.ids.copy_(state.last[at])
    step.positions.copy_(positions)
    step.context_lens.copy_(lengths)
    step.slot_mapping.copy_(blocks * block_size + offsets)
    used = torch.arange(tables.shape[1], device=tables.device) <= pages[:, None]
    step.block_tables.copy_(torch.where(used, tables, step.block_tables))
    step.temperature.copy_(state.temperature[at])
    step.keys.copy_(state.keys[at])


def advance(slots: torch.Tensor, ids: torch.Tensor, state: State) -> None:
    """Append ids [B] int64 to the sequences of `slots` [B] int32. Padding rows change nothing.

    No slot but the last may occur twice.
    """
    at = slots.long()
    real = at < len(state.last) - 1
    state.last[at[real]] = ids[real]
    state.lengths[at[real]] += 1
