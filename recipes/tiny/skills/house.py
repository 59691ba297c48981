"""Questions about kvrun and its words."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny import entries
from recipes.tiny.grammar import Turn

KVRUN = entries.read("kvrun.txt")


def house(rng: Random) -> list[Turn]:
    return [entries.turn(rng, rng.choice(KVRUN), "kvrun")]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {"kvrun": (7.0, house)}
