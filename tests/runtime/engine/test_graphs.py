"""Captured decode steps, run by the kernels' twins: the same answers, with and without them.

On CPU nothing is captured: a "replay" runs the step again over the same tensors, which is all that
the state, the rows and the padding know of it.
"""

import dataclasses
import random
from typing import Any

import pytest
import torch

from kvrun.runtime.attention import triton
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine
from kvrun.runtime.engine.request import Delta, Request
from kvrun.runtime.engine.start import start
from kvrun.runtime.kernels.step import State
from kvrun.runtime.sampling.params import SamplingParams
from tests.runtime.engine.scripted import check_pages

GREEDY = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
MIXED = [
    GREEDY,
    SamplingParams(max_tokens=9, temperature=0.8, seed=1, ignore_eos=True),
    SamplingParams(max_tokens=30, temperature=1.3, seed=2, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=1.0, top_p=0.7, seed=3, ignore_eos=True),
    SamplingParams(max_tokens=15, temperature=0, repetition_penalty=1.3, ignore_eos=True),
    SamplingParams(max_tokens=10, temperature=0.9, seed=5, n=3, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0, logprobs=2, ignore_eos=True),
    SamplingParams(max_tokens=8, temperature=0, prompt_logprobs=1, ignore_eos=True),
]
Answers = dict[tuple[str, int], list[int]]


@pytest.fixture
def graphed(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes engines on the device-side step; counts how often it was replayed."""
    monkeypatch.setattr(triton.Attention, "reject", staticmethod(lambda spec, device: None))

    def make(**changes: Any) -> tuple[Engine, list[int]]:
        engine = start(dataclasses.replace(config, attention="triton", **changes))
        runner: Any = engine._runner
        replays: list[int] = []

        def capture(run: Any) -> Any:
            return lambda: (replays.append(1), run())

        runner.capture(16, torch.float32, capture)
        return engine, replays

    return make


def run(engine: Engine, requests: list[Request], every: int = 1) -> Answers:
    """The tokens of every choice; a request joins every `every` steps."""
    waiting, found, steps = list(requests), {}, 0
    while waiting or not engine.idle:
        if waiting and steps % every == 0:
            engine.add(waiting.pop(0))
        for delta in engine.step():
            assert delta.error is None
            found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
        check_pages(engine)
        steps += 1
    return found


def requests(options: list[SamplingParams], count: int) -> list[Request]:
    source = random.Random(4)
    return [
        Request(
            id=str(number),
            prompt_ids=[source.randrange(96) for _ in range(source.randint(1, 40))],
            params=options[number % len(options)],
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(("run_ahead", "turns"), [(0, 1), (1, 1), (3, 1), (0, 3), (4, 3)])
@pytest.mark.parametrize("options", [[GREEDY], MIXED], ids=["greedy", "mixed"])
def test_answers_are_the_same_with_and_without(
    graphed: Any, config: EngineConfig, run_ahead: int, turns: int, options: list[SamplingParams]
) -> None:
    work = requests(options, 14)
    expected = run(start(config), work)
    engine, replays = graphed(run_ahead=run_ahead)
    engine.scheduler._turns, engine.scheduler._many = turns, 1
    assert run(engine, work, every=3) == expected
    assert len(replays) > 40
    assert run(engine, work) == expected, "from the prefix cache, in slots used before"


def test_preempted_sequences_come_back(graphed: Any, config: EngineConfig) -> None:
    work = requests([dataclasses.replace(GREEDY, max_tokens=40)], 8)
    expected = run(start(config), work)
    room = 2 * 2 * 2 * 8 * 4 * 4 * 45  # 44 blocks of 4 tokens; 8 requests would need about 120
    engine, replays = graphed(kv_memory=room, run_ahead=2, max_model_len=100)
    assert run(engine, work) == expected
    assert engine.stats().preemptions > 0
    assert len(replays) > 40


def test_a_sibling_that_starts_with_one_token_is_not_taken_for_its_predecessor(
    graphed: Any,
) -> None:
    """One token to compute looks like a decode step, but nobody has drawn it in this slot."""
    engine, _ = graphed()
    params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, n=2)
    prompt = list(range(30, 47))  # 4 full blocks and one token, which each choice computes
    found = run(engine, [Request(id="a", prompt_ids=prompt, params=params)])
    assert found["a", 0] == found["a", 1]
    # Tenants that leave their slots at the length at which the next ones start.
    run(engine, [Request(id="b", prompt_ids=[5] * 11, params=params)])
    assert run(engine, [Request(id="c", prompt_ids=prompt, params=params)])["c", 1] == found["a", 0]


def test_aborted_rows_leave_no_trace(graphed: Any, config: EngineConfig) -> None:
    work = requests([GREEDY], 6)
    expected = run(start(config), work)
    engine, _ = graphed(run_ahead=3)
    for request in work:
        engine.add(request)
    found: Answers = {}
    ended: set[str] = set()
    while not engine.idle:
        deltas: list[Delta] = engine.step()
        for delta in deltas:
            found.setdefault((delta.request_id, 0), []).extend(delta.token_ids)
            if delta.finish_reason == "abort":
                ended.add(delta.request_id)
        if len(found.get(("2", 0), [])) > 5 and "2" not in ended:
            engine.abort("2")
    assert ended == {"2"}
    del found["2", 0], expected["2", 0]
    assert found == expected
    assert run(engine, work)["2", 0] == run(start(config), work)["2", 0]


def test_padding_rows_change_nobody(graphed: Any) -> None:
    engine, replays = graphed()
    run(engine, requests([GREEDY], 5))
    state: State = engine._runner._slots.state  # type: ignore[attr-defined]
    assert len(replays) > 20
    assert not state.tables[-1].any(), "padding writes to the block that is nobody's"
    unused = slice(5, 16)
    assert not state.last[unused].any()
    assert (state.lengths[unused] == 1).all()
