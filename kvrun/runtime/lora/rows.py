"""Which rows of a step use which adapters, and what that adds to a product."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch

from kvrun.runtime.device import kernel
from kvrun.runtime.kernels.lora import CROWD
from kvrun.runtime.kernels.lora_heads import change_by_head
from kvrun.runtime.lora.adapter import LARGEST_RANK
from kvrun.runtime.lora.beyond import Beyond, Send, beyond

if TYPE_CHECKING:
    from kvrun.runtime.lora.resident import Adapter, Resident

HEIGHT = 16  # rows of a tile where sequences decode: the least that tensor cores multiply
TALL = 64  # where prompts are computed
_MANY = 512  # tokens of a step from which on it is taller
# Up to so many rows times adapters all of a step's adapters are multiplied as one on CPU: what is
# computed for nothing costs less than calling more operators.
_JOINED = 64
_JOINED_BYTES = 64 << 20  # of copies of adapters that are kept for it


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
        return Grouped(resident, of_row, extra)
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
        """Whether `shrink` knows prologues (a norm, a gate)."""

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
            act=prologue.get("act"),
            parts=parts,
        )
        return sums

    def expand(
        self, site: int, low: torch.Tensor, y: torch.Tensor, prologue: dict[str, Any]
    ) -> None:
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
        rows, tiles = tiled(of_row, HEIGHT)
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


class Grouped:
    """The same on CPU, by ordinary products: some for each adapter, or two for all together.

    Two for all multiply every row by every adapter and drop what is not its own: for the few rows
    of a decode step that costs less than the operators it saves.
    """

    takes_in = False

    def __init__(
        self, resident: "Resident", of_row: np.ndarray, extra: Beyond | None = None
    ) -> None:
        self._resident = resident
        self.extra = extra
        slots = np.unique(of_row[of_row > 0])
        self._slots: list[int] = slots.tolist()
        self._of_row = torch.from_numpy(of_row)
        few = len(of_row) * len(slots) <= _JOINED
        self._joined = few and resident.bytes_of(self._slots) <= _JOINED_BYTES
        self._rows = [_selection(of_row, slot) for slot in self._slots]
        self._prepared: dict[int, list[_Product]] = {}

    def shrink(
        self, site: int, x: torch.Tensor, prologue: dict[str, Any]
    ) -> "list[tuple[_Product, torch.Tensor]] | None":
        products = self._prepared.get(site)
        if products is None:
            products = self._prepared[site] = self._prepare(site)
        found = []
        for product in products:
            low = torch.mm(x if product.rows is None else x[product.rows], product.a)
            found.append((product, low if product.mask is None else low.mul_(product.mask)))
        return found or None

    def expand(self, site: int, low: Any, y: torch.Tensor, prologue: dict[str, Any]) -> None:
        for product, sums in low:
            for begin, end, at, b in product.parts:
                part = sums if b.shape[0] == sums.shape[1] else sums[:, begin:end]
                target = y if b.shape[1] == y.shape[1] else y[:, at : at + b.shape[1]]
                if product.rows is None:
                    target.addmm_(part, b)
                elif isinstance(product.rows, slice):
                    target[product.rows].addmm_(part, b)
                else:
                    target.index_add_(0, product.rows, torch.mm(part, b))

    def by_head(
        self, site: int, x: torch.Tensor, y: torch.Tensor, *, first: int, back: bool
    ) -> None:
        width = (x if back else y).shape[2]
        for slot, rows in zip(self._slots, self._rows, strict=True):
            a, bs = self._resident.matrices(slot, site)
            if len(a):
                b = bs[0].view(len(a), x.shape[1], -1)[:, :, first : first + width]
                mine = slice(None) if rows is None else rows
                y[mine] += change_by_head(x[mine], a, b, back)

    def _prepare(self, site: int) -> "list[_Product]":
        if self._joined:
            return self._join(site)
        products = []
        for slot, rows in zip(self._slots, self._rows, strict=True):
            a, bs = self._resident.matrices(slot, site)
            parts, begin, at = [], 0, 0
            for b in bs:
                if len(b):
                    parts.append((begin, begin + len(b), at, b))
                begin, at = begin + len(b), at + b.shape[1]
            if parts:
                products.append(_Product(rows, a.t(), None, parts))
        return products

    def _join(self, site: int) -> "list[_Product]":
        """All adapters' A below each other, and their B with zeros beside each part."""
        found = [(slot, *self._resident.matrices(slot, site)) for slot in self._slots]
        a = torch.cat([a for _, a, _ in found])
        if not len(a):
            return []
        blocks = [torch.block_diag(*bs) for _, _, bs in found]  # type: ignore[no-untyped-call]
        b = torch.cat(blocks)
        owners = torch.cat([torch.full((len(a),), slot) for slot, a, _ in found])
        mine = self._of_row[:, None] == owners
        mask = None if bool(mine.all()) else mine.to(a.dtype)
        return [_Product(None, a.t(), mask, [(0, len(b), 0, b)])]


class _Product(NamedTuple):
    """Rows (None: all), A transposed [in, ranks], which of x · A to keep, and per part the ranks
    [begin, end), the first of its outputs and B [ranks, out]."""

    rows: slice | torch.Tensor | None
    a: torch.Tensor
    mask: torch.Tensor | None
    parts: list[tuple[int, int, int, torch.Tensor]]


def _selection(of_row: np.ndarray, slot: int) -> slice | torch.Tensor | None:
    """The rows of one adapter: None for all, a slice where they lie side by side."""
    rows = np.flatnonzero(of_row == slot)
    if len(rows) == len(of_row):
        return None
    first, last = int(rows[0]), int(rows[-1]) + 1
    return slice(first, last) if last - first == len(rows) else torch.from_numpy(rows)
