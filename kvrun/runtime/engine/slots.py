"""Slots: what the device knows of every running sequence, kept true by small uploads."""

from collections.abc import Sequence

import numpy as np
import torch

from kvrun.runtime.engine.sequence import Sequence as Running
from kvrun.runtime.kernels.noise import keys
from kvrun.runtime.kernels.step import State


class Slots:
    """A row of every tensor of `state` for each running sequence, and one more for padding.

    Block tables exist twice: `tables` on the host, rewritten only where a sequence has grown, and
    in `state`, brought up to date by `upload`. `fed[slot]` is the sequence's length as the device
    counts it, or -1 where it does not know: then a captured step cannot go on from it.
    """

    def __init__(self, count: int, pages: int, device: torch.device) -> None:
        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((count + 1, *shape), dtype=dtype, device=device)

        self.padding = count
        self.state = State(
            last=zeros(dtype=torch.int64),
            lengths=torch.ones(count + 1, dtype=torch.int32, device=device),
            tables=zeros(pages, dtype=torch.int32),
            temperature=zeros(dtype=torch.float32),
            keys=zeros(2, dtype=torch.int32),
        )
        self.tables = np.zeros((count + 1, pages), np.int32)
        self.fed = np.full(count + 1, -1, np.int64)
        self._device = device
        self._pages = pages
        self._lists: list[list[int] | None] = [None] * (count + 1)
        self._written = [0] * (count + 1)
        self._changed: dict[int, int] = {}  # place in the flat table of the device -> block
        self._new: dict[int, tuple[float, int, int]] = {}  # slot -> temperature and noise keys

    def note(self, sequence: Running) -> None:
        """Write down what has changed about a sequence since the last step."""
        slot, blocks = sequence.slot, sequence.blocks
        # A sequence that starts anew brings a new list; while it runs, its list only grows.
        if self._lists[slot] is not blocks:
            # What pads a neighbour's pages is read too, and must not be somebody else's block.
            self._write(slot, 0, [0] * self._written[slot])
            self._lists[slot], self._written[slot] = blocks, 0
            self.fed[slot] = -1
            first, second = keys(sequence.seed, sequence.index)
            params = sequence.request.params
            self._new[slot] = (0.0 if params.greedy else params.temperature, first, second)
        if self._written[slot] < len(blocks):
            self._write(slot, self._written[slot], blocks[self._written[slot] :])
            self._written[slot] = len(blocks)

    def _write(self, slot: int, page: int, blocks: list[int]) -> None:
        self.tables[slot, page : page + len(blocks)] = blocks
        for place, block in enumerate(blocks, slot * self._pages + page):
            self._changed[place] = block

    def upload(self) -> None:
        """Bring the device up to date with all that was noted."""
        if self._changed:
            places, blocks = self.send(list(self._changed), list(self._changed.values()))
            self.state.tables.view(-1).index_copy_(0, places, blocks.int())
            self._changed = {}
        if self._new:
            new = self._new.values()
            temperatures = np.array([t for t, _, _ in new], np.float32).view(np.int32)
            at, bits, first, second = self.send(
                list(self._new), temperatures, [a for _, a, _ in new], [b for _, _, b in new]
            )
            self.state.temperature.index_copy_(0, at, bits.int().view(torch.float32))
            self.state.keys.index_copy_(0, at, torch.stack((first, second), 1).int())
            self._new = {}

    def send(self, *columns: "np.ndarray | Sequence[int]") -> Sequence[torch.Tensor]:
        """One int64 tensor per column, all views of one that crosses to the device at once."""
        sizes = [len(column) for column in columns]
        whole = torch.from_numpy(np.concatenate(columns, dtype=np.int64, casting="unsafe"))
        if self._device.type == "cuda":
            # From pageable memory the copy would wait for the steps that are under way.
            whole = whole.pin_memory().to(self._device, non_blocking=True)
        return torch.split_with_sizes(whole, sizes)
