"""Beyond: what the adapters of a step change beyond adding B · A to products of layers.

Plain torch on every device: steps with such adapters are launched operator by operator.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels.moe import More
from kvrun.runtime.lora.settle import Matrix, matrix_of, settle

if TYPE_CHECKING:
    from kvrun.runtime.lora.resident import Adapter, Resident
    from kvrun.runtime.quant import Weight

NormChange = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
Added = tuple[More | None, More | None]
Send = Callable[..., Sequence[torch.Tensor]]
_AT_ONCE = 1 << 22  # values of vectors that are gathered at a time


def beyond(resident: "Resident", of_row: np.ndarray, send: Send) -> "Beyond | None":
    """For the adapters by row: slots [T], 0 for none. None if all of them are A and B only."""
    slots = np.unique(of_row[of_row > 0]).tolist()
    apart = [slot for slot in slots if resident.adapter(slot).source.layout.apart]
    return Beyond(resident, of_row, apart, send) if apart else None


class Beyond:
    """The adapters in `slots`, and the rows [T] of the step that have them."""

    def __init__(
        self, resident: "Resident", of_row: np.ndarray, slots: list[int], send: Send
    ) -> None:
        self._resident, self._slots = resident, slots
        self._send = send
        place = np.full(int(of_row.max()) + 1, -1)
        place[slots] = np.arange(len(slots))
        rows = [np.flatnonzero(of_row == slot) for slot in slots]
        at, self._index, *sent = send(self._vectors(), place[of_row], *rows)
        self._at = at.view(len(slots), len(resident.sites), 2)
        self._rows = dict(zip(slots, sent, strict=True))
        self._listed: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._ids: dict[int, torch.Tensor] = {}
        self._changes: dict[int, Change | None] = {}
        self._values = _as_fp32(resident.arena)

    def at(self, site: int) -> "Change | None":
        """What there is to do about one product of a layer; None if nothing is."""
        if site not in self._changes:
            slots = [s for s in self._slots if site in self._adapter(s).source.layout.extras]
            self._changes[site] = Change(self, site, slots) if slots else None
        return self._changes[site]

    def embed(
        self,
        site: int,
        ids: torch.Tensor,
        x: torch.Tensor,
        base: Callable[[int, int], torch.Tensor],
        vocab: int,
    ) -> None:
        """Change the rows x [T, hidden] that the base's table has for `ids` [T]; `base` gives a
        range of its `vocab` rows."""
        for slot in self._slots:
            rows = self._rows[slot]
            a, (b, *_) = self._resident.matrices(slot, site)
            own = self._weights(slot, site).get(0)
            if own is not None:
                x.index_copy_(0, rows, F.embedding(ids[rows], own))
            elif len(a):
                low = a.index_select(1, ids[rows]).t()
                x.index_copy_(0, rows, torch.addmm(x[rows], low, b))
            known, values = self._tokens(slot, site)
            if known is not None:
                hits = ids[rows].unsqueeze(1) == known
                found = values[hits.int().argmax(1)]
                x.index_copy_(0, rows, torch.where(hits.any(1, keepdim=True), found, x[rows]))
        change = self.at(site)
        if change is not None:
            change.settle(lambda: Matrix(base, vocab))
            change.finish(x, shifted=False)

    def head(
        self,
        site: int,
        x: torch.Tensor,
        y: torch.Tensor,
        last_rows: torch.Tensor,
        weight: "Weight",
        tied: int | None = None,
    ) -> torch.Tensor:
        """y [S, vocab], which the head has made of x [S, hidden], for the rows that are wanted.

        `tied`: the embedding whose rows the head's are.
        """
        index = self._index.index_select(0, last_rows)
        for number, slot in enumerate(self._slots):
            mine = (index == number).unsqueeze(1)  # which ones only the device knows
            a, (b, *_) = self._resident.matrices(slot, site)
            own = self._weights(slot, site).get(0)
            if own is not None:
                y = torch.where(mine, F.linear(x, own), y)
            elif len(a):
                y = y.addmm_(F.linear(x, a) * mine, b)
            known, values = (None, x) if tied is None else self._tokens(slot, tied)
            if known is not None:
                logits = torch.where(mine, F.linear(x, values), y.index_select(1, known))
                y.index_copy_(1, known, logits)
        change = self.at(site)
        if change is None:
            return y
        change.settle(lambda: matrix_of(weight, x))
        return change.everywhere(y, index)

    def norms(self, site: int, rows: torch.Tensor | None) -> "list[NormChange]":
        """For each adapter that changes a norm: which of the step's rows it changes, or of `rows`
        whether; its weight and bias [size] fp32, None where the base's stay."""
        index = None if rows is None else self._index.index_select(0, rows)
        found: list[NormChange] = []
        for number, slot in enumerate(self._slots):
            adapter = self._adapter(slot)
            extra = adapter.source.layout.extras.get(site)
            if extra is not None:
                flat, sites = self._resident.stretch(adapter), self._resident.sites
                start = extra.factor
                weight = None if start is None else sites.vector(flat, start, site)
                bias = sites.vector(flat, extra.shift, site) if extra.biases else None
                mine = self._rows[slot] if index is None else (index == number).unsqueeze(1)
                found.append((mine, weight, bias))
        return found

    def experts(self, up: int, down: int) -> "Iterator[tuple[torch.Tensor, Added]]":
        """Rows whose adapter changes experts, and what it adds to the products with each."""
        for slot in self._slots:
            added = self._added(slot, up), self._added(slot, down)
            if added != (None, None):
                yield self._rows[slot], added

    def _added(self, slot: int, site: int) -> More | None:
        a, (b, *_) = self._resident.matrices(slot, site)
        if not len(a):
            return None
        count = self._resident.sites.counts[site]
        a, b = a.view(count, -1, a.shape[1]), b.view(count, -1, b.shape[1])
        return lambda x, expert: F.linear(x, a[expert]) @ b[expert]

    def _adapter(self, slot: int) -> "Adapter":
        return self._resident.adapter(slot)

    def _weights(self, slot: int, site: int) -> dict[int, torch.Tensor]:
        """Replaced matrices of a site by part."""
        adapter = self._adapter(slot)
        extra = adapter.source.layout.extras.get(site)
        if extra is None:
            return {}
        flat, sites = self._resident.stretch(adapter), self._resident.sites
        return {p: sites.weight(flat, start, (site, p)) for p, start in extra.weights.items()}

    def _tokens(self, slot: int, site: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Ids whose rows of an embedding are others, and these."""
        adapter = self._adapter(slot)
        flat, extra = self._resident.stretch(adapter), adapter.source.layout.extras.get(site)
        if extra is None or extra.tokens is None:
            return None, flat
        if slot not in self._ids:
            self._ids[slot] = self._send(extra.ids)[0]
        return self._ids[slot], self._resident.sites.tokens(flat, extra, site)

    def _vectors(self) -> np.ndarray:
        """Where factor and shift of each adapter and site begin, in fp32 values of the arena."""
        found = np.zeros((len(self._slots), len(self._resident.sites), 2), np.int64)
        size = self._resident.arena.dtype.itemsize
        for number, slot in enumerate(self._slots):
            adapter = self._adapter(slot)
            for site, extra in adapter.source.layout.extras.items():
                starts = (extra.factor or 0, extra.shift)
                found[number, site] = [(adapter.start + start) * size // 4 for start in starts]
        return found.reshape(-1)

    def _rows_with(self, slots: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that have one of these adapters, and the adapters' numbers."""
        key = tuple(slots)
        if key not in self._listed:
            numbers = torch.cat(
                [torch.full_like(self._rows[s], self._slots.index(s)) for s in slots]
            )
            self._listed[key] = torch.cat([self._rows[s] for s in slots]), numbers
        return self._listed[key]


class Change:
    """What some adapters do to one product: y -> y · factor + shift, or another matrix."""

    def __init__(self, step: Beyond, site: int, slots: list[int]) -> None:
        self._step, self._site, self._slots = step, site, slots
        extras = [step._adapter(slot).source.layout.extras[site] for slot in slots]
        scaling = [s for s, extra in zip(slots, extras, strict=True) if extra.factor is not None]
        self._scaling = scaling

    def settle(self, base: Callable[[], Matrix]) -> None:
        """Make the vectors final, once for an adapter on the device: they need the base."""
        resident = self._step._resident
        new = [s for s in self._slots if self._site not in resident.adapter(s).settled]
        if new:
            known = base()
            for slot in new:
                settle(resident, slot, self._site, known)

    def replace(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Multiply the rows of x whose adapters have a matrix of their own by that one."""
        outs = self._step._resident.sites.outs[self._site]
        for slot in self._slots:
            rows = self._step._rows[slot]
            for part, own in self._step._weights(slot, self._site).items():
                at = sum(outs[:part])
                y[:, at : at + outs[part]].index_copy_(0, rows, F.linear(x[rows], own))

    def finish(self, y: torch.Tensor, *, scaled: bool = True, shifted: bool = True) -> None:
        """Scale and shift the rows of y [T, out]; one alone where a sum lies between."""
        if scaled and self._scaling:
            self._apply(y, self._scaling, 0, torch.Tensor.mul_)
        if shifted:
            self._apply(y, self._slots, 1, torch.Tensor.add_)

    def by_head(self, x: torch.Tensor, *, first: int, shifted: bool = True) -> torch.Tensor:
        """x [T, heads, n], which are the values `first` : `first + n` of each head, changed."""
        heads, n = x.shape[1:]
        width = sum(self._step._resident.sites.outs[self._site])
        for kind, slots in enumerate((self._scaling, self._slots if shifted else [])):
            if slots:
                rows, numbers = self._step._rows_with(slots)
                starts = self._step._at[:, self._site, kind].index_select(0, numbers)
                for some, begin in _chunks(rows, starts, width):
                    vector = self._gather(begin, width).view(len(some), heads, -1)
                    vector, found = vector[:, :, first : first + n], x.index_select(0, some)
                    changed = found * vector if kind == 0 else found + vector
                    x.index_copy_(0, some, changed.to(x.dtype))
        return x

    def everywhere(self, y: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """The same for y [S, out] whose rows have the adapters `index` [S], -1 for none."""
        numbers = [self._step._slots.index(slot) for slot in self._scaling]
        for kind, known in ((0, numbers), (1, [self._step._slots.index(s) for s in self._slots])):
            for number in known:
                start = self._step._at[number, self._site, kind]
                vector = self._gather(start.view(1), y.shape[1])
                changed = y.float() * vector if kind == 0 else y.float() + vector
                y = torch.where((index == number).unsqueeze(1), changed.to(y.dtype), y)
        return y

    def _apply(self, y: torch.Tensor, slots: list[int], kind: int, change: Any) -> None:
        rows, numbers = self._step._rows_with(slots)
        starts = self._step._at[:, self._site, kind].index_select(0, numbers)
        width = y.shape[1]
        for some, begin in _chunks(rows, starts, width):
            found = y.index_select(0, some).float()
            y.index_copy_(0, some, change(found, self._gather(begin, width)).to(y.dtype))

    def _gather(self, starts: torch.Tensor, width: int) -> torch.Tensor:
        columns = torch.arange(width, device=starts.device)
        return self._step._values[starts.unsqueeze(1) + columns]


def _chunks(
    rows: torch.Tensor, starts: torch.Tensor, width: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    count = max(1, _AT_ONCE // width)
    for first in range(0, len(rows), count):
        yield rows[first : first + count], starts[first : first + count]


def _as_fp32(arena: torch.Tensor) -> torch.Tensor:
    return arena[: len(arena) // 2 * 2].view(torch.float32)
