"""Resident: the adapters that lie on the device, where a step finds them."""

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from kvrun.errors import KvrunError
from kvrun.runtime.lora.sites import Sites
from kvrun.runtime.lora.sources import Source
from kvrun.runtime.lora.transfer import Landing, Transfer

# Adapters on the device at a time, "none" included.
SLOTS = 1024


@dataclass(eq=False)
class Adapter:
    """One content under one name. Replacing a name makes a new one; who uses the old one keeps it.

    `slot` is its row in the table of those on the device, where it lies from element `start` on.
    """

    name: str
    source: Source
    bytes: int  # of its matrices
    parts: "tuple[Adapter, ...]" = ()  # of a weighted sum
    identity: str | None = None  # of its content, once that has been read
    host: torch.Tensor | None = None
    reading: "Future[tuple[torch.Tensor, str, float]] | None" = None
    error: KvrunError | None = None
    slot: int = 0
    start: int = 0
    placement: int = 0  # which copy to the device this is; 0 for none
    landed: Landing | None = None  # None where there is no way to go
    users: int = 0  # sequences, choices of requests, that have not ended
    pins: int = 0  # those of them that may not lose its place on the device
    retired: bool = False
    load_seconds: float | None = None
    settled: set[int] = field(default_factory=set)  # sites whose extras on the device are final

    @property
    def size(self) -> int:
        return self.source.layout.size

    @property
    def state(self) -> str:
        if self.error:
            return "failed"
        return "device" if self.slot else "disk" if self.host is None else "host"


class Resident:
    """`arena` [room] holds the adapters, `table` [SLOTS, sites, width] int64 says where.

    A row of the table is a `Layout.table`, shifted; slot 0 is no adapter. `ranks` [SLOTS, sites]
    are those of all parts together. Adapters that are not in use go, least recently used first.
    """

    def __init__(
        self, sites: Sites, *, device: torch.device, dtype: torch.dtype, room: int
    ) -> None:
        self.sites = sites
        self.room = room // dtype.itemsize if len(sites) else 0  # elements
        self.arena = _memory(self.room, dtype, device)
        self.table = torch.zeros((SLOTS, len(sites), sites.width), dtype=torch.int64, device=device)
        self.ranks = np.zeros((SLOTS, len(sites)), np.int64)
        self.copies = 0  # to the device, since the start
        self._transfer = Transfer(device) if device.type == "cuda" else None
        self._underway: list[Landing] = []
        self._free = list(range(SLOTS - 1, 0, -1))
        self._placed: OrderedDict[Adapter, None] = OrderedDict()  # least recently used first
        self._in_slot: dict[int, Adapter] = {}

    def touch(self, adapter: Adapter) -> None:
        """It is wanted now."""
        if adapter in self._placed:
            self._placed.move_to_end(adapter)

    def take_in(self, adapter: Adapter) -> bool:
        """Give an adapter that has been read its place, evicting what is not in use.

        False if what is in use leaves no room.
        """
        pinned = [a for a in self._placed if a.pins]
        if self._gap(adapter.size, pinned) is None or len(pinned) >= SLOTS - 1:
            return False
        while (start := self._gap(adapter.size, list(self._placed))) is None or not self._free:
            self.evict(next(a for a in self._placed if not a.pins))
        adapter.start = start
        self._copy(adapter)
        return True

    @property
    def underway(self) -> "list[Future[torch.cuda.Event]]":
        """What is being sent to the device."""
        self._underway = [landing for landing in self._underway if not landing.sent.done()]
        return [landing.sent for landing in self._underway]

    def evict(self, adapter: Adapter) -> None:
        """Its place is free; no step that uses it may be open."""
        del self._placed[adapter]
        del self._in_slot[adapter.slot]
        self._free.append(adapter.slot)
        adapter.slot = adapter.placement = 0

    def adapter(self, slot: int) -> Adapter:
        """The one that lies there."""
        return self._in_slot[slot]

    def stretch(self, adapter: Adapter) -> torch.Tensor:
        """Its part of the arena."""
        return self.arena[adapter.start : adapter.start + adapter.size]

    def matrices(self, slot: int, site: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """A [ranks, in], and B transposed [rank, out] of each part; ranks may be 0."""
        adapter, inner = self._in_slot[slot], self.sites.inner[site]
        row, flat = adapter.source.layout.table[site].tolist(), self.arena[adapter.start :]
        a = flat[row[0] : row[0] + row[1] * inner].view(row[1], inner)
        return a, [
            flat[row[at] : row[at] + row[at + 2] * out].view(row[at + 2], out)
            for at, out in zip(range(2, self.sites.width, 3), self.sites.outs[site], strict=False)
        ]

    def bytes_of(self, slots: Sequence[int]) -> int:
        """What the adapters in these slots take."""
        return sum(self._in_slot[slot].bytes for slot in slots)

    def _gap(self, size: int, placed: list[Adapter]) -> int | None:
        """The first place between those that are `placed`."""
        at = 0
        for other in sorted(placed, key=lambda a: a.start):
            if other.start - at >= size:
                return at
            at = other.start + other.size
        return at if self.room - at >= size else None

    def _copy(self, adapter: Adapter) -> None:
        """Host to device, beside the steps that run."""
        flat, slot = adapter.host, self._free.pop()
        assert flat is not None
        table = adapter.source.layout.table
        self.ranks[slot] = table[:, 1]
        shifted = torch.from_numpy(_shifted(table, adapter.start))
        target = self.arena[adapter.start : adapter.start + adapter.size]
        parts = [(flat, target), (shifted, self.table[slot])]
        if self._transfer is None:
            for source, there in parts:
                there.copy_(source)
        else:
            adapter.landed = self._transfer.send(parts)
            self._underway.append(adapter.landed)
        self.copies += 1
        adapter.settled.clear()
        adapter.slot, adapter.placement = slot, self.copies
        self._placed[adapter] = None
        self._in_slot[slot] = adapter


def _shifted(table: np.ndarray, start: int) -> np.ndarray:
    """A layout's table for a stretch that begins at `start`."""
    shifted = table.copy()
    shifted[:, 0] += start
    shifted[:, 2::3] += start
    return shifted


def _memory(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.empty(count, dtype=dtype, device=device)
    # Taken from the system only as it fills.
    memory = torch.from_numpy(np.zeros(max(count, 1) * dtype.itemsize, np.uint8))
    return memory.view(dtype)[:count]  # torch gives nothing another dtype
