"""Where an adapter's matrices come from beside a PEFT folder: random values, a weighted sum."""

import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch

from kvrun.errors import InvalidRequest, Unsupported
from kvrun.runtime.lora.adapter import LARGEST_RANK, AdapterFolder
from kvrun.runtime.lora.sites import ALIGN, LAYERED, Layout, Place, Sites

RANDOM = "dummy:"
_PERIOD = 1 << 20  # values


class Source(Protocol):
    """What is known of an adapter before its matrices are read."""

    path: Path
    ranks: dict[Place, int]
    layout: Layout

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
        """The matrices, laid out, and what tells them from all others. May take long."""


def open_source(path: str, sites: Sites) -> Source:
    """The adapter at `path`; "dummy:RANK:SEED" is random, on every product or on those whose names
    end as one of "dummy:RANK:SEED:q_proj,v_proj" does."""
    return RandomAdapter(path, sites) if path.startswith(RANDOM) else AdapterFolder(path, sites)


class RandomAdapter:
    """A and B normal · 0.01, the scale 1, the same for the same seed: for measurements."""

    def __init__(self, path: str, sites: Sites) -> None:
        _, rank, seed, *ends = path.split(":")
        if not rank.isdecimal() or not 1 <= int(rank) <= LARGEST_RANK or len(ends) > 1:
            raise InvalidRequest(f"'{path}' is no random adapter.", hint=f"{RANDOM}RANK:SEED")
        endings = tuple(ends[0].split(",")) if ends else ("",)
        self.path = Path(path)
        self._seed = zlib.crc32(seed.encode())
        self.ranks = {
            (site, part): int(rank)
            for site, shards in enumerate(sites.shards)
            for part, shard in enumerate(shards)
            if shard.name.endswith(endings) and sites.roles[site] in LAYERED
        }
        self.layout = sites.lay_out(self.ranks)

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
        at = self._seed % (_PERIOD // ALIGN) * ALIGN
        return _random(dtype, _PERIOD + self.layout.size)[at:][: self.layout.size], str(self.path)


@lru_cache(2)
def _random(dtype: torch.dtype, count: int) -> torch.Tensor:
    """Values that all adapters of a size share, each from another place on: thousands of them
    take the time and the memory of one. They come again after a period."""
    generator = torch.Generator().manual_seed(0)
    values = torch.empty(_PERIOD).normal_(0.0, 0.01, generator=generator).to(dtype)
    return values.repeat(-(-count // _PERIOD))[:count]


class Blend:
    """Σ weight · adapter, exactly: the A's one below the other, the B's side by side.

    `parts` are read already, or read again here; their sums of ranks must be servable.
    """

    def __init__(self, parts: "Sequence[tuple[Source, float]]", name: str, sites: Sites) -> None:
        self.path = Path(name)
        self._parts = list(parts)
        self._sites = sites
        self.ranks: dict[Place, int] = {}
        for source, weight in parts:
            if not math.isfinite(weight):
                raise InvalidRequest(f"an adapter's weight is {weight}.", hint="a finite number")
            stacked = [site for site, _ in source.ranks if sites.roles[site] == "experts"]
            if source.layout.extras or stacked:
                raise InvalidRequest(
                    f"the adapter {source.path} cannot be a part of a weighted sum.",
                    hint="it changes experts, or scales or replaces something (DoRA, biases, "
                    "modules_to_save)",
                )
            for place, rank in source.ranks.items():
                self.ranks[place] = self.ranks.get(place, 0) + rank
        if max(self.ranks.values(), default=0) > LARGEST_RANK:
            raise Unsupported(
                f"these adapters together have rank {max(self.ranks.values())}; {LARGEST_RANK} is "
                "the largest."
            )
        self.layout = sites.lay_out(self.ranks)

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
        flat = torch.zeros(self.layout.size, dtype=dtype)
        filled = dict.fromkeys(self.ranks, 0)
        names = []
        for source, weight in self._parts:
            part, identity = source.read(dtype)
            names.append(f"{weight!r} {identity}")
            for place, rank in source.ranks.items():
                a, b = self._sites.views(self.layout, flat, place)
                from_a, from_b = self._sites.views(source.layout, part, place)
                at = filled[place]
                a[at : at + rank].copy_(from_a)
                b[at : at + rank].copy_(from_b.float() * weight)
                filled[place] = at + rank
        return flat, " + ".join(names)
