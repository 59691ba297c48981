"""Sites: the products of a model that adapters can change, and where an adapter's matrices lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from kvrun.runtime.checkpoint import Shard

# Elements to which matrices are aligned: 16 bytes in 16 bits, what a GPU loads at once.
ALIGN = 8
# Vision-language models were renamed in transformers 5.
_RENAMED = (
    ("language_model.model.", "model.language_model."),
    ("model.language_model.", "language_model.model."),
)
Place = tuple[int, int]  # a site, and one of its shards
Flat = TypeVar("Flat", torch.Tensor, np.ndarray)


@dataclass(frozen=True)
class Layout:
    """Where the matrices of one adapter lie in its one stretch of `size` elements.

    For each site and part with a rank, A is [rank, in] of this rank's columns, and the scaled B is
    kept transposed, [rank, out] of this rank's rows: both are read in long rows at any rank. The
    A's of a site lie one below the other. `table` [sites, width] int64 says where, per site: the
    start of A, the rank of all parts together; then for every part the start of its B, the row of
    A at which it begins, and its rank.
    """

    size: int
    table: np.ndarray


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
        self._places: dict[str, list[Place]] = {}
        for site, shards in enumerate(sites):
            for part, shard in enumerate(shards):
                self._places.setdefault(shard.name, []).append((site, part))

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def names(self) -> list[str]:
        return list(self._places)

    def shard(self, place: Place) -> Shard:
        return self.shards[place[0]][place[1]]

    def find(self, module: str) -> list[Place]:
        """The places of a matrix by the name that a PEFT file has for it; none if there is none.

        The file's name may have a prefix that the checkpoint's lacks, or lack one.
        """
        for name in (module, *(module.replace(a, b) for a, b in _RENAMED if a in module)):
            if name in self._places:
                return self._places[name]
        ends = [
            known
            for known in self._places
            if module.endswith("." + known) or known.endswith("." + module)
        ]
        return self._places[ends[0]] if len(ends) == 1 else []

    def lay_out(self, ranks: Mapping[Place, int]) -> Layout:
        """One stretch for matrices of these ranks."""
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
        return Layout(at, table)

    def views(self, layout: Layout, flat: Flat, place: Place) -> tuple[Flat, Flat]:
        """A [rank, in] and B transposed [rank, out] of one place, in an adapter's stretch."""
        site, part = place
        row = layout.table[site].tolist()
        start, first, rank = row[2 + 3 * part : 5 + 3 * part]
        out, inner = self.shard(place).shape
        a = flat[row[0] + first * inner :][: rank * inner].reshape(rank, inner)
        return a, flat[start : start + rank * out].reshape(rank, out)


def _aligned(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
