"""Sites: the products of a model that adapters can change, and where an adapter's matrices lie."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.source import Ranges

# Elements to which matrices are aligned: 16 bytes in 16 bits, what a GPU loads at once.
ALIGN = 8
# Vision-language models and some experts were renamed in transformers 5.
_RENAMED = (
    ("language_model.model.", "model.language_model."),
    ("model.language_model.", "language_model.model."),
    (".mlp.", ".block_sparse_moe."),
    (".block_sparse_moe.", ".mlp."),
    (".experts.gate_up_proj", ".input_linear"),
    (".experts.down_proj", ".output_linear"),
)
Place = tuple[int, int]  # a site, and one of its shards
Flat = TypeVar("Flat", torch.Tensor, np.ndarray)
LAYERED = ("linear", "by head")  # products to which the kernels add B · A


@dataclass(frozen=True)
class Extra:
    """What an adapter changes about one product beyond adding B · A: y -> y · factor + shift.

    `factor` and `shift` are the starts of vectors with a value for each output row of all parts, in
    fp32, at two elements a value. Until the first step that uses them (`settle.py`) the factor
    holds DoRA's magnitudes of the parts `magnitudes`, and the shift what is added to the output or,
    for the parts `biases`, the bias in the place of the base's. `weights`: of parts whose matrix is
    replaced, the start of that matrix [out, in]. `tokens`: the start of rows [ids, hidden] in the
    place of an embedding's. Of a norm, factor and shift are its weight and, if in `biases`, bias.
    """

    shift: int
    factor: int | None = None
    magnitudes: frozenset[int] = frozenset()
    biases: frozenset[int] = frozenset()
    weights: Mapping[int, int] = field(default_factory=dict)
    tokens: int | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Where the matrices of one adapter lie in its one stretch of `size` elements.

    For each site and part with a rank, A is [rank, in] of this rank's columns, and the scaled B is
    kept transposed, [rank, out] of this rank's rows: both are read in long rows at any rank. The
    A's of a site lie one below the other. `table` [sites, width] int64 says where, per site: the
    start of A, the rank of all parts together; then for every part the start of its B, the row of
    A at which it begins, and its rank. `extras`, by site, lie behind all of these: from `vectors`
    on there are fp32 values. `apart`: the adapter changes more than products of layers, and has
    steps of its own. `ranks` are those that occur.
    """

    size: int
    table: np.ndarray
    vectors: int
    extras: Mapping[int, Extra] = field(default_factory=dict)
    apart: bool = False
    ranks: tuple[int, ...] = ()


class Sites:
    """All products of a model, each as the shards whose rows are its output.

    `parts` is the largest number of shards that a product has.
    """

    def __init__(self, sites: Sequence[tuple[Shard, ...]]) -> None:
        self.shards = list(sites)
        self.parts = max((len(shards) for shards in sites), default=1)
        self.width = 2 + 3 * self.parts
        self.inner = [shards[0].shape[1] for shards in sites]  # columns of each product
        self.outs = [[shard.shape[0] for shard in shards] for shards in sites]  # rows, by part
        self.counts = [getattr(shards, "copies", 1) for shards in sites]  # matrices of each product
        self.roles = [getattr(shards, "role", "linear") for shards in sites]
        self.stacks = "experts" in self.roles  # whether a product is one of many matrices
        self._found: dict[str, list[Place]] = {}
        self._places: dict[str, list[Place]] = {}
        for site, shards in enumerate(sites):
            for part, shard in enumerate(shards):
                self._places.setdefault(shard.name, []).append((site, part))

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def parts_of(self, place: Place) -> tuple[str, ...]:
        """What the parts of each expert are called where they are stored by themselves."""
        found: tuple[str, ...] = getattr(self.shards[place[0]], "parts", ())
        return found

    def shard(self, place: Place) -> Shard:
        return self.shards[place[0]][place[1]]

    def find(self, module: str) -> list[Place]:
        """The places of a matrix by the name that a PEFT file has for it; none if there is none.

        The file's name may have a prefix that the checkpoint's lacks, or lack one.
        """
        if module not in self._found:
            self._found[module] = self._find(module)
        return self._found[module]

    def _find(self, module: str) -> list[Place]:
        names = [module, *(module.replace(a, b) for a, b in _RENAMED if a in module)]
        for name in names:
            if name in self._places:
                return self._places[name]
        ends = [
            known
            for known in self._places
            if any(name.endswith("." + known) or known.endswith("." + name) for name in names)
        ]
        return self._places[ends[0]] if len(ends) == 1 else []

    def lay_out(
        self,
        ranks: Mapping[Place, int],
        beyond: Mapping[Place, Collection[str]] | None = None,
        ids: Mapping[Place, tuple[int, ...]] | None = None,
    ) -> Layout:
        """One stretch for matrices of these ranks, and for what is `beyond` A and B of a place:
        some of "weight", "magnitude", "bias", "shift", "gain" and "tokens", which are `ids`."""
        table = np.zeros((len(self.shards), self.width), np.int64)
        at = 0
        for site, shards in enumerate(self.shards):
            row, inner = table[site], self.inner[site]
            total = sum(ranks.get((site, part), 0) for part in range(len(shards)))
            if not total:
                continue
            row[:2] = at, total
            at += _aligned(total * inner)
            first = 0
            for part, shard in enumerate(shards):
                rank = ranks.get((site, part), 0)
                row[2 + 3 * part : 5 + 3 * part] = at, first, rank
                at += _aligned(rank * shard.shape[0])
                first += rank
        occurring = tuple(sorted({r // self.counts[site] for (site, _), r in ranks.items()}))
        apart = any(self.roles[site] not in LAYERED for site, _ in ranks)
        if not beyond:
            return Layout(at, table, at, {}, apart, occurring)
        extras, vectors, at = self._lay_out_extras(beyond, ids or {}, at)
        return Layout(at, table, vectors, extras, True, occurring)

    def _lay_out_extras(
        self,
        beyond: Mapping[Place, Collection[str]],
        ids: Mapping[Place, tuple[int, ...]],
        at: int,
    ) -> tuple[dict[int, Extra], int, int]:
        """All matrices from `at` on, then all vectors; the start of these, and the end."""
        weights: dict[Place, int] = {}
        for place in sorted(p for p, kinds in beyond.items() if "weight" in kinds):
            weights[place] = at
            rows, columns = self.shard(place).shape
            at += _aligned(rows * columns)
        tokens: dict[int, int] = {}
        for place, known in ids.items():
            tokens[place[0]] = at
            at += _aligned(len(known) * self.shard(place).shape[0])
        vectors, extras = at, {}
        for site in sorted({site for site, _ in beyond}):
            parts = {part: kinds for (s, part), kinds in beyond.items() if s == site}
            room = _aligned(2 * sum(self.outs[site]))
            magnitudes = frozenset(p for p, kinds in parts.items() if "magnitude" in kinds)
            scales = bool(magnitudes) or any("gain" in kinds for kinds in parts.values())
            extras[site] = Extra(
                shift=at,
                factor=at + room if scales else None,
                magnitudes=magnitudes,
                biases=frozenset(p for p, kinds in parts.items() if "bias" in kinds),
                weights={part: start for (s, part), start in weights.items() if s == site},
                tokens=tokens.get(site),
                ids=ids.get((site, 0), ()),
            )
            at += 2 * room if scales else room
        return extras, vectors, at

    def vector(self, flat: torch.Tensor, start: int, site: int) -> torch.Tensor:
        """A vector of a site's extra [out of all parts] fp32, in an adapter's stretch."""
        count = sum(self.outs[site])
        return flat[start : start + _aligned(2 * count)].view(torch.float32)[:count]

    def weight(self, flat: torch.Tensor, start: int, place: Place) -> torch.Tensor:
        """A replaced matrix [out, in] of one place, in an adapter's stretch."""
        rows, columns = self.shard(place).shape
        if self.roles[place[0]] == "embedding":
            rows, columns = columns, rows  # one row for each id
        return flat[start : start + rows * columns].view(rows, columns)

    def tokens(self, flat: torch.Tensor, extra: Extra, site: int) -> torch.Tensor:
        """Rows [ids, hidden] in the place of an embedding's, in an adapter's stretch."""
        hidden, start = self.outs[site][0], extra.tokens or 0
        return flat[start : start + len(extra.ids) * hidden].view(-1, hidden)

    def views(self, layout: Layout, flat: Flat, place: Place) -> tuple[Flat, Flat]:
        """A [rank, in] and B transposed [rank, out] of one place, in an adapter's stretch."""
        site, part = place
        row = layout.table[site].tolist()
        start, first, rank = row[2 + 3 * part : 5 + 3 * part]
        out, inner = self.shard(place).shape
        a = flat[row[0] + first * inner :][: rank * inner].reshape(rank, inner)
        return a, flat[start : start + rank * out].reshape(rank, out)


def cut(matrix: torch.Tensor, dim: int, ranges: Ranges | None) -> torch.Tensor:
    """The ranges of one dimension that a rank keeps, in the order in which it wants them."""
    if ranges is None or ranges == ((0, matrix.shape[dim]),):
        return matrix
    return torch.cat([matrix.narrow(dim, a, b - a) for a, b in ranges], dim)


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
