"""StateCache: what recurrent layers remember of every running sequence, one row each."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch


@dataclass(frozen=True)
class StateSpec:
    """What one recurrent layer remembers: the last inputs [window, channels] of its convolution,
    in the model's dtype, and a state of `shape` in fp32."""

    layer: int
    window: int
    channels: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Where the B sequences of a step have their states; those that are `fresh` have none yet."""

    cache: "StateCache"
    read: torch.Tensor  # [B] int64
    write: torch.Tensor  # [B] int64
    fresh: torch.Tensor  # [B] bool


class StateCache:
    """Two rows of every layer's tensors for each slot, and two for padding.

    A step reads one row of a slot and writes the other; `commit` makes what was written valid. A
    step that has failed on its way can be tried again: what it read is still there.

    A sequence at its first token reads zeros whatever lies there, so no row is ever cleared.
    """

    def __init__(
        self, specs: Sequence[StateSpec], slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        rows = 2 * (slots + 1)
        self._valid = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._windows = {
            s.layer: _zeros((rows, s.window, s.channels), dtype, device) for s in specs
        }
        self._states = {s.layer: _zeros((rows, *s.shape), torch.float32, device) for s in specs}

    def rows(
        self, slots: torch.Tensor, cu_seqlens: torch.Tensor, context_lens: torch.Tensor
    ) -> Rows:
        """For a step of the sequences in `slots` [B] (see Batch for the rest). Reads nothing back,
        so that a captured step finds what is valid when it is replayed."""
        at = slots.long()
        valid = self._valid.index_select(0, at)
        fresh = context_lens == cu_seqlens.diff()
        return Rows(self, 2 * at + valid, 2 * at + 1 - valid, fresh)

    def commit(self, slots: torch.Tensor) -> None:
        """What the last step has written for `slots` [B] int64 is what the next one reads."""
        self._valid.index_copy_(0, slots, 1 - self._valid.index_select(0, slots))

    def window(self, layer: int, rows: Rows) -> torch.Tensor:
        """[B, window, channels], a copy"""
        return _read(self._windows[layer], rows)

    def state(self, layer: int, rows: Rows) -> torch.Tensor:
        """[B, *shape] fp32, a copy"""
        return _read(self._states[layer], rows)

    def keep_window(self, layer: int, write: torch.Tensor, window: torch.Tensor) -> None:
        """What is remembered from now on, in rows `write` [n]."""
        self._windows[layer].index_copy_(0, write, window.to(self._windows[layer].dtype))

    def keep_state(self, layer: int, write: torch.Tensor, state: torch.Tensor) -> None:
        self._states[layer].index_copy_(0, write, state)


def bytes_per_sequence(specs: Sequence[StateSpec], dtype: torch.dtype) -> int:
    """Bytes that a slot takes in all layers together, both rows."""
    return 2 * sum(s.window * s.channels * dtype.itemsize + 4 * prod(s.shape) for s in specs)


def _read(tensor: torch.Tensor, rows: Rows) -> torch.Tensor:
    found = tensor.index_select(0, rows.read)
    # Not a product with zero: what an ended sequence has left may be NaN.
    return found.masked_fill_(rows.fresh.view(-1, *[1] * (found.ndim - 1)), 0)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # As keys and values: memory is taken from the system on first use.
    memory = np.zeros(prod(shape) * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
