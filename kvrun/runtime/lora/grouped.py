"""The adapters of a step on CPU, by ordinary products."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from kvrun.runtime.kernels.lora_heads import change_by_head
from kvrun.runtime.lora.beyond import Beyond

if TYPE_CHECKING:
    from kvrun.runtime.lora.resident import Resident

# Up to so many rows times adapters all of a step's adapters are multiplied as one: what is computed
# for nothing costs less than calling more operators.
_JOINED = 64
_JOINED_BYTES = 64 << 20  # of copies of adapters that are kept for it


class Grouped:
    """`Rows` by ordinary products: some for each adapter, or two for all together.

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
