"""Which rows of a step use which adapters, and what that adds to a product."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from kvrun.runtime.device import kernel, native
from kvrun.runtime.kernels.lora import CROWD
from kvrun.runtime.lora.adapter import LARGEST_RANK
from kvrun.runtime.lora.beyond import Beyond, Send, beyond
from kvrun.runtime.lora.grouped import Grouped

if TYPE_CHECKING:
    from kvrun.runtime.lora.resident import Adapter, Resident

HEIGHT = 16  # rows of a tile where sequences decode: the least that tensor cores multiply
TALL = 64  # where prompts are computed
_MANY = 512  # tokens of a step from which on it is taller
_ALONE = 8  # rows of a captured step up to which none shares a tile
_FEW = 16  # rows whose products are kvrun's own


class Assigned(NamedTuple):
    """The adapters of the sequences of a step: their slots, 0 for none, and what tells them from
    all others that may have lain there."""

    slots: list[int]
    placements: list[int]


def assigned(adapters: "Sequence[Adapter | None]") -> Assigned | None:
    """None if there is no adapter among them."""
    if not any(adapters):
        return None
    found = [(0, 0) if a is None else (a.slot, a.placement) for a in adapters]
    return Assigned([slot for slot, _ in found], [placement for _, placement in found])


def rows_of(resident: "Resident", of_row: np.ndarray, send: Send) -> "Rows":
    """The adapters of a step by row: slots [T], 0 for none. `send` brings columns to the device."""
    extra = beyond(resident, of_row, send)
    if resident.arena.device.type == "cpu":
        module = native("lora")
        if module is None or resident.arena.dtype not in module.ROWS:
            return Grouped(resident, of_row, extra)
        return Compiled(resident, of_row, module, extra)
    height = TALL if len(of_row) > _MANY else HEIGHT
    rows, tiles = tiled(of_row, height)
    sent = send(rows, tiles.reshape(-1))
    slots = np.unique(of_row[of_row > 0]).tolist()
    return Tiled(resident, sent[0].int(), sent[1].int().view(-1, 3), height, slots, extra)


class Rows(Protocol):
    """The adapters of a step. Between `shrink` and `expand` lies the product itself.

    `extra` is what they change beyond that, None where there is no such thing.
    """

    extra: Beyond | None

    @property
    def takes_in(self) -> bool:
        """Whether `shrink` knows a norm as its prologue."""

    def shrink(self, site: int, x: torch.Tensor, prologue: dict[str, Any]) -> Any:
        """A · x of the rows with adapters; None if none of these changes this product."""

    def expand(self, site: int, low: Any, y: torch.Tensor, prologue: dict[str, Any]) -> None:
        """Add B times what `shrink` has found to y [tokens, out]."""

    def by_head(
        self, site: int, x: torch.Tensor, y: torch.Tensor, *, first: int, back: bool
    ) -> None:
        """Add B · A · x to y, both [tokens, heads, ...], of a product multiplied head by head: y
        are the outputs of each head from `first` on, or, going `back`, x is."""


class Tiled:
    """Rows listed by adapter and cut into tiles of at most `height`, for the kernels.

    `rows` [N] and `tiles` [G, 3] int32 may be rewritten between replays of a captured step; its
    `slots` are not known then, and every adapter that may come has room.
    """

    def __init__(
        self,
        resident: "Resident",
        rows: torch.Tensor,
        tiles: torch.Tensor,
        height: int,
        slots: Sequence[int] | None = None,
        extra: Beyond | None = None,
    ) -> None:
        self.extra = extra
        self._resident, self._rows, self._tiles, self._height = resident, rows, tiles, height
        self._kernel = kernel("lora", rows.device)
        self._heads = kernel("lora_heads", rows.device)
        self._ranks = None if slots is None else resident.ranks[list(slots)].max(0).tolist()
        self._outs = resident.sites.outs

    @property
    def takes_in(self) -> bool:
        return self._resident.arena.dtype is not torch.float16  # x · norm may be beyond it

    def shrink(self, site: int, x: torch.Tensor, prologue: dict[str, Any]) -> torch.Tensor | None:
        parts = len(self._outs[site])
        width = LARGEST_RANK * parts if self._ranks is None else self._ranks[site]
        if not width:
            return None
        beside = _branch(x)
        with torch.cuda.stream(beside) if beside is not None else nullcontext():
            sums: torch.Tensor = self._kernel.shrink(
                x,
                self._resident.arena,
                self._resident.table[:, site],
                self._rows,
                self._tiles,
                height=self._height,
                features=self._resident.sites.inner[site],
                width=width,
                norm=prologue.get("norm"),
                parts=parts,
            )
        return sums

    def expand(
        self, site: int, low: torch.Tensor, y: torch.Tensor, prologue: dict[str, Any]
    ) -> None:
        if (beside := _beside(y)) is not None:
            torch.cuda.current_stream().wait_stream(beside)
        self._kernel.expand(
            low,
            y,
            self._resident.arena,
            self._resident.table[:, site],
            self._rows,
            self._tiles,
            height=self._height,
            features=self._resident.sites.inner[site],
            outs=self._outs[site],
            eps=prologue.get("eps"),
        )

    def by_head(
        self, site: int, x: torch.Tensor, y: torch.Tensor, *, first: int, back: bool
    ) -> None:
        self._heads.by_head(
            x,
            y,
            self._resident.arena,
            self._resident.table[:, site],
            self._rows,
            self._tiles,
            height=self._height,
            features=self._resident.sites.inner[site],
            size=self._outs[site][0] // x.shape[1],
            first=first,
            back=back,
        )


def _branch(x: torch.Tensor) -> torch.cuda.Stream | None:
    """Where `shrink` runs beside the product of a captured step, from here on; None: before it.

    Measured on an H100 with the 8B shape: a step of one row on an adapter goes from 6.45 to 6.06
    ms, of 64 rows from 9.52 to 9.31; of 8 rows, whose products leave it little room, it loses.
    """
    if (beside := _beside(x)) is not None:
        beside.wait_stream(torch.cuda.current_stream())
    return beside


def _beside(x: torch.Tensor) -> torch.cuda.Stream | None:
    worth = len(x) == 1 or len(x) > _FEW
    if not (worth and x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return _second(x.device)


@cache
def _second(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def tiled(of_row: np.ndarray, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots by row [T], 0 for none -> rows by adapter [N], tiles [G, 3] of at most `height` rows.

    A tile is a slot, the first of its rows in the list, and their count.
    """
    rows = np.flatnonzero(of_row)
    rows = rows[np.argsort(of_row[rows], kind="stable")]
    slots, starts, counts = np.unique(of_row[rows], return_index=True, return_counts=True)
    pieces = -(-counts // height)
    before = np.repeat(np.cumsum(pieces) - pieces, pieces)
    within = (np.arange(len(before)) - before) * height
    left = np.repeat(counts, pieces) - within
    tiles = np.stack(
        (np.repeat(slots, pieces), np.repeat(starts, pieces) + within, np.minimum(left, height)), 1
    )
    return rows.astype(np.int32), tiles.astype(np.int32)


class Captured:
    """Rows and tiles of captured steps, in tensors that stay where they are.

    There is room for `tokens` rows that belong to at most `sequences` sequences.
    """

    def __init__(self, resident: "Resident", tokens: int, sequences: int) -> None:
        self._resident = resident
        self._tokens, self._sequences = tokens, sequences
        room = tokens + 3 * self.tiles(tokens)
        self._buffer = torch.zeros(room, dtype=torch.int32, device=resident.arena.device)
        self._shown = 0

    def tiles(self, tokens: int, few: bool = False) -> int:
        """As many as there can be: each sequence may have an adapter of its own, unless few do."""
        return tokens // CROWD if few else min(tokens, tokens // HEIGHT + self._sequences)

    def few(self, tokens: int) -> bool:
        """Whether what is shown has few tiles for a step of `tokens` rows."""
        return self._shown <= self.tiles(tokens, few=True)

    def show(self, of_row: np.ndarray, send: Send) -> None:
        """From the next replay on these are the adapters by row: slots [T], 0 for none."""
        # So few that each may be a tile: on an H100 a step of the 8B shape with 8 rows of one
        # adapter took 7.82 ms in one tile and takes 7.15 in eight.
        alone = np.count_nonzero(of_row) <= _ALONE
        rows, tiles = tiled(of_row, 1 if alone else HEIGHT)
        whole = np.zeros(len(self._buffer), np.int32)
        whole[: len(rows)] = rows
        whole[self._tokens : self._tokens + tiles.size] = tiles.reshape(-1)
        self._buffer.copy_(send(whole)[0])
        self._shown = len(tiles)

    def clear(self) -> None:
        """No row has an adapter."""
        self._buffer.zero_()
        self._shown = 0

    def rows(self, tokens: int, tiles: int) -> Tiled:
        """For a step of `tokens` rows in at most so many tiles."""
        room = self._buffer[self._tokens :].view(-1, 3)[:tiles]
        return Tiled(self._resident, self._buffer[:tokens], room, HEIGHT)


class Compiled:
    """The same on CPU, in C: one call for all adapters of a product, but for those with so many
    rows that ordinary products are faster."""

    takes_in = False

    def __init__(
        self,
        resident: "Resident",
        of_row: np.ndarray,
        module: ModuleType,
        extra: Beyond | None = None,
    ) -> None:
        self.extra = extra
        self._resident, self._of_row, self._module = resident, of_row, module
        many = (np.bincount(of_row) > module.ROWS[resident.arena.dtype])[of_row]
        few, rest = np.where(many, 0, of_row), np.where(many, of_row, 0)
        self._rest = Grouped(resident, rest) if rest.any() else None
        rows, tiles = tiled(few, module.HEIGHT)
        self._rows, self._tiles = torch.from_numpy(rows), torch.from_numpy(tiles)
        self._ranks: list[int] = resident.ranks[np.unique(few)].max(0).tolist()
        self._changes: dict[int, Any] = {}

    def shrink(self, site: int, x: torch.Tensor, prologue: dict[str, Any]) -> Any:
        """x itself, which the product leaves as it is, so that `expand` does all at once; and what
        the products of others have found."""
        rest = None if self._rest is None else self._rest.shrink(site, x, prologue)
        return (x, rest) if self._ranks[site] or rest is not None else None

    def expand(self, site: int, low: Any, y: torch.Tensor, prologue: dict[str, Any]) -> None:
        x, rest = low
        if self._ranks[site]:
            change = self._changes.get(site)
            if change is None:
                change = self._changes[site] = self._change(site)
            change.add(x, y)
        if self._rest is not None and rest is not None:
            self._rest.expand(site, rest, y, prologue)

    def by_head(
        self, site: int, x: torch.Tensor, y: torch.Tensor, *, first: int, back: bool
    ) -> None:
        self._all.by_head(site, x, y, first=first, back=back)

    @cached_property
    def _all(self) -> Grouped:
        return Grouped(self._resident, self._of_row)

    def _change(self, site: int) -> Any:
        return self._module.Change(
            self._resident.arena,
            self._resident.table[:, site],
            self._rows,
            self._tiles,
            features=self._resident.sites.inner[site],
            outs=self._resident.sites.outs[site],
            width=self._ranks[site],
        )
