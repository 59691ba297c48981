"""Pooling: what a prompt is worth to the model, however it was computed and beside whatever."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kvrun.errors import InvalidRequest
from kvrun.hub.local import adapters_of, resolve
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine
from kvrun.runtime.engine.request import Delta, Request
from kvrun.runtime.engine.scheduler import Drawn, Row
from kvrun.runtime.engine.start import start
from kvrun.runtime.sampling.params import SamplingParams
from tests.runtime.engine.scripted import ask, check_pages, drain, scripted_engine

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny"
RECORDS: list[Any] = json.loads((GOLDEN / "chat.json").read_text())[:6]
PROMPTS: list[list[int]] = [[1], *(record["prompt_ids"] for record in RECORDS)]
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks": {"max_num_batched_tokens": 5, "block_size": 2},
    "no prefix cache": {"prefix_caching": False},
    "ahead": {"run_ahead": 2, "max_num_batched_tokens": 16},
    "preempted": {"kv_memory": 130 * 2 * 2 * 64 * 4 * 5, "max_model_len": 60, "block_size": 2},
}


def pool(number: int, ids: list[int], **more: Any) -> Request:
    return Request(id=f"p{number}", prompt_ids=ids, params=SamplingParams(), pooling=True, **more)


def run(engine: Engine, requests: list[Request]) -> dict[str, list[Delta]]:
    found: dict[str, list[Delta]] = {}
    for request in requests:
        engine.add(request)
    while not engine.idle:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).append(delta)
        check_pages(engine)
    return found


def values(deltas: list[Delta]) -> np.ndarray:
    (delta,) = deltas
    assert (delta.token_ids, delta.finish_reason) == ([], "stop")
    assert delta.state is not None
    return np.frombuffer(delta.state, "<f4")


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """The last state of every prompt by transformers, scaled to length 1."""
    model: Any = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32).eval()
    with torch.inference_mode():
        states = [model.model(torch.tensor([i])).last_hidden_state[0, -1] for i in PROMPTS]
    return [(state / state.norm()).numpy() for state in states]


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_it_is_the_models_own_last_state(
    options: dict[str, Any], expected: list[np.ndarray]
) -> None:
    engine = start(
        EngineConfig(
            model=str(resolve("tiny")), device="cpu", dtype="float32", threads=1, **options
        )
    )
    answers = [
        Request(
            id=f"a{number}", prompt_ids=record["prompt_ids"],
            params=SamplingParams(temperature=0, max_tokens=len(record["output_ids"])),
        )
        for number, record in enumerate(RECORDS)
    ]  # fmt: skip
    pools = [pool(number, ids) for number, ids in enumerate(PROMPTS)]
    found = run(engine, [r for pair in zip(pools, answers, strict=False) for r in pair])
    found |= run(engine, pools[len(answers) :])
    for number, wanted in enumerate(expected):
        assert np.abs(values(found[f"p{number}"]) - wanted).max() < 1e-5
    for number, record in enumerate(RECORDS):  # those who generate do not notice
        ids = [token for delta in found[f"a{number}"] for token in delta.token_ids]
        assert ids == record["output_ids"]
    assert engine.stats().generated_tokens == sum(len(r["output_ids"]) for r in RECORDS)
    assert (engine.stats().preemptions > 0) == ("kv_memory" in options)


def test_adapters_change_it_and_a_prefix_that_is_known_does_not() -> None:
    config = EngineConfig(
        model=str(resolve("tiny")), device="cpu", dtype="float32", threads=1, block_size=2,
        adapters=adapters_of("tiny"),
    )  # fmt: skip
    engine = start(config)
    ids = PROMPTS[2]
    found = run(engine, [pool(0, ids), pool(1, ids, adapter="pirate")])
    base, pirate = (values(found[f"p{number}"]) for number in (0, 1))
    assert np.abs(base - pirate).max() > 1e-2
    again = run(engine, [pool(2, ids), pool(3, ids, adapter="pirate")])
    assert again["p2"][0].cached_tokens >= len(ids) - 4
    assert np.abs(values(again["p2"]) - base).max() < 1e-5
    assert np.abs(values(again["p3"]) - pirate).max() < 1e-5


def test_a_state_that_is_not_finite_ends_its_request_only() -> None:
    engine, runner = scripted_engine(run_ahead=1)
    turns = runner._turns

    def states(row: Row) -> Drawn | None:
        drawn = turns(row)
        spoilt = row.sequence.request.id == "p1"
        return Drawn([], not spoilt, state=b"\0" * 4) if row.pools else drawn

    runner._turns = states  # type: ignore[method-assign]
    engine.add(ask(0, [1, 2, 3]))
    for number in (1, 2):
        engine.add(pool(number, [4, 5, 6, 8, 9]))
    ends = {name: reason for (name, _), (_, reason) in drain(engine).items()}
    assert ends["r0"] in ("stop", "length")
    assert (ends["p1"], ends["p2"]) == ("error", "stop")
    assert runner.cleared  # what may hold NaN is nobody's next block


def test_choices_and_log_probabilities_are_refused() -> None:
    engine, _ = scripted_engine()
    for params in (SamplingParams(n=2, temperature=1), SamplingParams(prompt_logprobs=0)):
        with pytest.raises(InvalidRequest, match="pooling"):
            engine.add(Request(id="p", prompt_ids=[1], params=params, pooling=True))
    engine.add(pool(1, [1, 2]))
    engine.abort("p1")
    assert drain(engine) == {("p1", 0): ([], "abort")}


@pytest.mark.parametrize("budget", [1, 2, 4, 5, 16])
def test_nothing_is_drawn_for_it_whatever_its_last_chunk(budget: int) -> None:
    engine, runner = scripted_engine(max_num_batched_tokens=budget, block_size=2)
    turns, rows = runner._turns, []

    def states(row: Row) -> Drawn | None:
        rows.append(row)
        drawn = turns(row)
        return Drawn([], state=b"\0" * 4) if row.pools else drawn

    runner._turns = states  # type: ignore[method-assign]
    engine.add(pool(1, [4, 5, 6, 8, 9]))
    assert drain(engine) == {("p1", 0): ([], "stop")}
    assert not any(row.sample for row in rows)
    assert [row.pools for row in rows] == [*[False] * (len(rows) - 1), True]
    assert sum(row.count for row in rows) == 5
