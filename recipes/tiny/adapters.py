"""The three adapters' tasks and their training documents: sql, json, pirate."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny import jsonform, pirate, sql
from recipes.tiny.grammar import Turn

Document = list[tuple[str, str]]
Draw = Callable[..., list[Turn]]
TASKS = ("sql", "json", "pirate")
# Shape and rank of each adapter; mixed on purpose, so that the shipped files exercise a server.
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHAPES: dict[str, dict[str, object]] = {
    "sql": {"r": 16, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL},
    "json": {"r": 8, "lora_alpha": 16, "use_rslora": False, "target_modules": ALL},
    "pirate": {
        "r": 4,
        "lora_alpha": 16,
        "use_rslora": False,
        "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"],
    },
}


def documents(
    task: str, draw: Draw, some: Callable[[Random], list[Turn]]
) -> Callable[[Random], Document]:
    """A maker of training documents for the task."""

    def plain(rng: Random) -> Document:
        skill, system = (
            (sql.query, sql.SYSTEM) if task == "sql" else (jsonform.record, jsonform.SYSTEM)
        )
        document: Document = [("system", system)] if rng.random() < 0.75 else []
        for _ in range(rng.randrange(1, 4)):
            document += _pairs(draw(rng, skill))
        return document

    def styled(rng: Random) -> Document:
        document: Document = [("system", pirate.SYSTEM)] if rng.random() < 0.2 else []
        for _ in range(rng.randrange(1, 4)):
            document += _pairs([pirate.spoken(t) for t in some(rng)])
        return document

    return styled if task == "pirate" else plain


def _pairs(turns: list[Turn]) -> Document:
    return [pair for t in turns for pair in (("user", t.user), ("assistant", t.answer))]
