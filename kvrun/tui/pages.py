"""The pages of the KV cache as a map: whose each is, by the number of its column."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvrun.runtime.engine.request import Pages

FREE, CACHED, SHARED, OTHER = "·", "○", "s", "?"


@dataclass(frozen=True)
class Cell:
    """One place of the map: a mark, and the column it is coloured for (0: none)."""

    mark: str
    place: int = 0


@dataclass(frozen=True)
class PageMap:
    """`cells` stand for `scale` pages each, from page 1 on; what is not shown is free."""

    cells: tuple[Cell, ...]
    scale: int
    used: int
    shared: int
    cached: int
    total: int


def page_map(pages: Pages, places: Mapping[str, int], room: int) -> PageMap:
    """The map in at most `room` cells; `places` are the columns of requests, from 1.

    A page in the tables of several requests holds a prefix they share. A cell of several pages
    shows what most of those in use are.
    """
    owners: dict[int, list[int]] = {}
    for request, blocks in pages.requests.items():
        for block in blocks:
            owners.setdefault(block, []).append(places.get(request, 0))
    by_block = {block: _cell(who) for block, who in owners.items()}
    cached = set(pages.cached) - by_block.keys()
    highest = max([*by_block, *cached], default=0)
    scale = max(1, -(-highest // max(1, room)))
    cells = [
        _together(range(first, min(first + scale, highest + 1)), by_block, cached)
        for first in range(1, highest + 1, scale)
    ]
    free = min(room, -(-pages.total // scale)) - len(cells)
    cells += [Cell(FREE)] * max(0, free)
    shared = sum(len(who) > 1 for who in owners.values())
    return PageMap(tuple(cells), scale, len(by_block), shared, len(cached), pages.total)


def _cell(who: list[int]) -> Cell:
    if len(who) > 1:
        return Cell(SHARED)
    return Cell(f"{who[0]:x}", who[0]) if 0 < who[0] < 16 else Cell(OTHER)


def _together(blocks: range, by_block: Mapping[int, Cell], cached: set[int]) -> Cell:
    found = [by_block[block] for block in blocks if block in by_block]
    if found:
        return max(dict.fromkeys(found), key=found.count)
    return Cell(CACHED if any(block in cached for block in blocks) else FREE)
