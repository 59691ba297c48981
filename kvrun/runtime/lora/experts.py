"""Experts that an adapter changes: PEFT's two ways to store that, and the stacks that they become.

`target_parameters` change all matrices of one parameter: A [experts * r, in], an expert's rows one
below the other, and B [out, r * experts], whose columns have the expert innermost. The second
parameter of a module hides behind `base_layer`, and none of their names says which one it is: the
shapes do. Where a family stores experts as [in, out] and does not say so, PEFT takes one for the
other. Files from before experts were stacked have an A and a B for each matrix.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.lora.sites import Layout, Place, Sites, cut
from kvrun.runtime.lora.tensors import Parts
from kvrun.runtime.tensorfile import Stored

_ONE = re.compile(r"(.+)\.(\d+)\.([^.]+)")
_STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Found:
    """One module of the file: what it changes of which stack.

    `expert` None: all of them, `turned` if A and B belong to the transposed matrices. Else one, and
    of its rows the share `half` of `halves`.
    """

    place: Place
    expert: int | None = None
    turned: bool = False
    half: int = 0
    halves: int = 1


@dataclass(frozen=True)
class Change:
    """Where it is and what becomes of it: scale · B · A."""

    found: Found
    a: Stored
    b: Stored
    rank: int
    scale: float


def find(sites: Sites, module: str, parts: Parts, path: Path) -> Found | None:
    """What of an expert a module is; None if it is none.

    Raises BadCheckpoint or Unsupported for one that cannot be what the model has.
    """
    if not sites.stacks:
        return None
    match = _ONE.fullmatch(module)
    if match is not None:
        for end in _STACKS:
            for place in sites.find(f"{match[1]}.{end}"):
                if match[3] in sites.parts_of(place):
                    return _one(sites, place, match, parts, path)
    name = module
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    places = [p for end in ("", *[f".{s}" for s in _STACKS]) for p in sites.find(name + end)]
    places = [place for place in places if sites.roles[place[0]] == "experts"]
    if not places:
        return None
    _refuse_others(module, parts, path)
    for turned in (False, True):
        for place in places:
            out, inner = _sizes(sites, place, turned)
            if (parts["A"].shape[1], parts["B"].shape[0]) == (inner, out):
                return Found(place, turned=turned)
    raise _wrong(module, parts, path)


def check(sites: Sites, module: str, change: Change, path: Path) -> None:
    """Raises BadCheckpoint where A and B are not of the model's sizes."""
    found, count = change.found, 1
    out, inner = _sizes(sites, found.place, found.turned)
    if found.expert is None:
        count = sites.counts[found.place[0]]
    wanted = (change.rank * count, inner), (out // found.halves, change.rank * count)
    if (change.a.shape, change.b.shape) != wanted:
        raise _wrong(module, {"A": change.a, "B": change.b}, path)


def ranks(sites: Sites, changes: Mapping[str, Change]) -> dict[Place, int]:
    """Of each stack: experts times the largest rank that one of them has."""
    whole: dict[tuple[Place, int | None], int] = {}
    for change in changes.values():
        key = change.found.place, change.found.expert
        whole[key] = whole.get(key, 0) + change.rank
    found: dict[Place, int] = {}
    for (place, _), rank in whole.items():
        found[place] = max(found.get(place, 0), rank * sites.counts[place[0]])
    return found


def fill(
    sites: Sites,
    layout: Layout,
    flat: torch.Tensor,
    changes: Mapping[str, Change],
    read: Callable[[Stored], torch.Tensor],
) -> None:
    """Lay A and B of all experts into an adapter's stretch, which is zero."""
    used: dict[tuple[Place, int | None], int] = {}
    for change in changes.values():
        found, place = change.found, change.found.place
        count, shard = sites.counts[place[0]], sites.shard(place)
        a, b = sites.views(layout, flat, place)
        a, b = a.view(count, -1, a.shape[1]), b.view(count, -1, b.shape[1])
        at = used.get((place, found.expert), 0)
        used[place, found.expert] = at + change.rank
        own_a, own_b = read(change.a).float(), read(change.b).float()
        if found.expert is None:
            # [experts, rank, in] and [experts, rank, out]
            own_a = own_a.view(count, change.rank, -1)
            own_b = own_b.view(len(own_b), change.rank, count).permute(2, 1, 0)
            own_a, own_b = (own_b, own_a) if found.turned else (own_a, own_b)
        else:
            a, b = a[found.expert :][:1], b[found.expert :][:1]
            whole = own_b.new_zeros(1, change.rank, shard.out_features)
            width = shard.out_features // found.halves
            whole[0, :, found.half * width :][:, :width] = own_b.t()
            own_a, own_b = own_a.unsqueeze(0), whole
        a[:, at : at + change.rank].copy_(cut(own_a, 2, shard.cols))
        b[:, at : at + change.rank].copy_(cut(own_b * change.scale, 2, shard.rows))


def _one(sites: Sites, place: Place, match: re.Match[str], parts: Parts, path: Path) -> Found:
    _refuse_others(match[0], parts, path)
    names = sites.parts_of(place)
    if int(match[2]) >= sites.counts[place[0]]:
        raise BadCheckpoint(
            f"the adapter in {path} was made for another model.",
            cause=f"{match[0]}: the model has {sites.counts[place[0]]} experts",
        )
    return Found(place, int(match[2]), False, names.index(match[3]), len(names))


def _sizes(sites: Sites, place: Place, turned: bool) -> tuple[int, int]:
    shard = sites.shard(place)
    sizes = shard.out_features, shard.in_features
    return sizes[::-1] if turned else sizes


def _refuse_others(module: str, parts: Parts, path: Path) -> None:
    if parts.keys() != {"A", "B"}:
        others = sorted(parts.keys() - {"A", "B"}) or ["a half of a pair"]
        raise Unsupported(
            f"the adapter in {path} changes {module}, which cannot be served.",
            cause=f"experts take A and B; it has {', '.join(others)}",
        )


def _wrong(module: str, parts: Parts, path: Path) -> BadCheckpoint:
    return BadCheckpoint(
        f"the adapter in {path} was made for another model.",
        cause=f"{module}: A is {list(parts['A'].shape)} and B is {list(parts['B'].shape)}, as none "
        "of the model's experts",
    )
