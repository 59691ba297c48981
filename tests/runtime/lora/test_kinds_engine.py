"""Kinds of adapters in the engine: each request answers as it does alone, whatever is beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrun.errors import InvalidRequest
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine
from kvrun.runtime.engine.request import Request
from kvrun.runtime.engine.start import start
from tests.runtime.lora.conftest import KINDS
from tests.runtime.lora.test_engine import ask, run

Make = Callable[..., EngineConfig]


def requests(count: int, seed: int = 0) -> list[Request]:
    choices = [*KINDS, None]
    return [ask(seed + n, choices[n % len(choices)]) for n in range(count)]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    return {}


def expected(make: Any, wanted: list[Request], known: dict[str, list[int]]) -> dict[str, list[int]]:
    engine: Engine | None = None
    for request in wanted:
        if request.id not in known:
            engine = engine or start(make(prefix_caching=False))
            known |= run(engine, [request])
    return {request.id: known[request.id] for request in wanted}


@pytest.mark.parametrize(
    "options",
    [
        {"run_ahead": 2},
        {"prefix_caching": False, "max_num_batched_tokens": 7},
        {"kv_memory": 60 * 2 * 2 * 16 * 4 * 4, "max_model_len": 64},
        {"lora_memory": 0},  # the largest adapter's
    ],
    ids=["ahead", "chunks", "preempted", "evicted"],
)
def test_each_request_answers_as_it_does_alone(
    config: Make, kinds: dict[str, str], alone: dict[str, list[int]], options: Any
) -> None:
    def make(**changes: Any) -> EngineConfig:
        return config(adapters=kinds, **changes)

    if "lora_memory" in options:
        options = {"lora_memory": max(info.bytes for info in start(make()).adapters())}
    engine = start(make(**options))
    assert run(engine, requests(12)) == expected(make, requests(12), alone)
    same = [ask(100 + n, kind, [1, 2, 3, 4, 5]) for n, kind in enumerate([*KINDS, None])]
    assert len({tuple(answer) for answer in run(engine, same, 0).values()}) == 6
    assert ("kv_memory" in options) == (engine.stats().preemptions > 0)
    assert engine._bank
    copies = engine._bank.resident.copies
    assert copies > 5 if "lora_memory" in options else copies == 5


def test_weighted_sums(config: Make, kinds: dict[str, str]) -> None:
    """A and B of tables are added up as all others are; what is no sum is refused, by its name."""
    engine = start(config(adapters=kinds))
    prompt = [1, 2, 3, 4, 5]
    choices: list[Any] = ["tables", [("tables", 0.25), ("tables", 0.75)], [("tables", 0.5)]]
    found = run(engine, [ask(n, choice, prompt) for n, choice in enumerate(choices)], 0)
    assert found["0"] == found["1"] != found["2"]
    for kind in ("dora", "saved", "biased"):
        with pytest.raises(InvalidRequest, match=rf"{kind} cannot be a part of a weighted sum"):
            engine.add(ask(9, [(kind, 0.5), ("four", 0.5)]))
    assert Path(kinds["four"]).is_dir()
