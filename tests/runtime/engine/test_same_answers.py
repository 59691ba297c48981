"""Greedy answers on a real model in fp32: alone, batched, chunked, after hits and preemptions.

Weights are made up but spread widely, so that a wrong page or position changes the answer.
"""

import dataclasses
import random

import pytest

from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine
from kvrun.runtime.engine.request import Request
from kvrun.runtime.engine.start import start
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.sampling.sampler import Prepared, Sampler, SampleRow
from tests.runtime.engine.scripted import drain

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
Answers = dict[int, list[int]]


def prompts(count: int) -> list[list[int]]:
    source = random.Random(3)
    head = [source.randrange(96) for _ in range(40)]
    # Half of them begin alike, so that prefixes are hit.
    return [
        head[: source.randint(5, 40)] + [source.randrange(96) for _ in range(source.randint(1, 30))]
        if i % 2
        else [source.randrange(96) for _ in range(source.randint(1, 70))]
        for i in range(count)
    ]


def answers(engine: Engine, params: SamplingParams = GREEDY) -> Answers:
    for number, ids in enumerate(prompts(12)):
        engine.add(Request(id=str(number), prompt_ids=ids, params=params))
    return {int(name): tokens for (name, _), (tokens, _) in drain(engine).items()}


def alone(config: EngineConfig, params: SamplingParams = GREEDY) -> Answers:
    engine = start(dataclasses.replace(config, prefix_caching=False, max_num_batched_tokens=128))
    found = {}
    for number, ids in enumerate(prompts(12)):
        engine.add(Request(id=str(number), prompt_ids=ids, params=params))
        found[number] = drain(engine)[str(number), 0][0]
    return found


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_batched_chunked_and_hit(config: EngineConfig, run_ahead: int) -> None:
    engine = start(dataclasses.replace(config, run_ahead=run_ahead, max_num_batched_tokens=16))
    expected = alone(config)
    assert len({tuple(tokens) for tokens in expected.values()}) == 12, "the model says one thing"
    assert answers(engine) == expected
    assert answers(engine) == expected, "the second time from the prefix cache"
    stats = engine.stats()
    assert stats.prefix_hit_tokens > 300
    assert stats.steps > 60


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_E1_preempted(config: EngineConfig, run_ahead: int) -> None:
    # Room for one sequence of 96 tokens and a fifth more; 2 layers, 2 heads of 8, fp32.
    token_bytes = 2 * 2 * 2 * 8 * 4
    engine = start(
        dataclasses.replace(
            config, run_ahead=run_ahead, kv_memory=int(116 * token_bytes), max_model_len=96
        )
    )
    assert answers(engine) == alone(config)
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_sampled_tokens_do_not_depend_on_neighbours(config: EngineConfig, run_ahead: int) -> None:
    params = dataclasses.replace(
        GREEDY, temperature=0.9, top_p=0.95, seed=7, repetition_penalty=1.1, logprobs=2
    )
    engine = start(dataclasses.replace(config, run_ahead=run_ahead))
    batched = answers(engine, params)
    assert batched == alone(config, params)
    assert batched != alone(config)


def test_logprobs_belong_to_their_tokens(config: EngineConfig) -> None:
    engine = start(config)
    for number, count in enumerate((None, 0, 3)):
        params = dataclasses.replace(GREEDY, logprobs=count)
        engine.add(Request(id=str(number), prompt_ids=[1, 2, 3], params=params))
    found: dict[str, list[object]] = {}
    while not engine.idle:
        for delta in engine.step():
            found.setdefault(delta.request_id, []).append((delta.token_ids, delta.logprobs))
    assert all(logprobs is None for _, logprobs in found["0"])
    for (ids, (zero,)), (_, (three,)) in zip(found["1"], found["2"], strict=True):
        assert zero.token_id == ids[0] == three.top[0][0], "greedy draws the likeliest"
        assert zero.logprob == three.logprob == three.top[0][1]
        assert zero.top == []
        assert [value for _, value in three.top] == sorted((v for _, v in three.top), reverse=True)
        assert len(three.top) == 3


def test_E7_what_a_broken_request_leaves_in_its_blocks_hurts_nobody(config: EngineConfig) -> None:
    clean, engine = (start(dataclasses.replace(config, prefix_caching=False)) for _ in range(2))
    cache = engine._runner._backend.cache  # type: ignore[attr-defined]
    for number, ids in enumerate(prompts(12)):
        engine.add(Request(id="bad", prompt_ids=ids, params=GREEDY))
        engine.step()
        (running,) = engine.scheduler.running
        for layer in range(2):
            cache.blocks(layer)[running.blocks] = float("nan")
        assert drain(engine)["bad", 0][1] == "error"
        # The same blocks again, for neighbours of almost one length, which are padded together.
        for one in (clean, engine):
            for cut in range(3):
                prompt = [1, 2, *ids][: len(ids) + cut]
                one.add(Request(id=f"{number}-{cut}", prompt_ids=prompt, params=GREEDY))
        assert drain(engine) == drain(clean)


def test_E7_a_neighbour_in_a_slot_used_before_is_not_hurt(config: EngineConfig) -> None:
    engine = start(dataclasses.replace(config, max_num_batched_tokens=256, prefix_caching=False))
    engine._runner._model._embedding.weight[95] = float("nan")  # type: ignore[attr-defined]
    # A long tenant first: its slot's table names blocks that the second of two others gets next.
    engine.add(Request(id="tenant", prompt_ids=[1] * 60, params=GREEDY))
    drain(engine)
    engine.add(Request(id="good", prompt_ids=[2] * 9, params=GREEDY))
    engine.add(Request(id="bad", prompt_ids=[3] * 15 + [95], params=GREEDY))
    ends = {name: end for (name, _), (_, end) in drain(engine).items()}
    assert ends == {"good": "length", "bad": "error"}


def test_E8_a_sampler_that_raises_ends_one_request(
    config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = Sampler.prepare

    def prepare(self: Sampler, rows: list[SampleRow]) -> Prepared:
        if any(row.seed == 13 for row in rows):
            raise RuntimeError("this seed cannot be drawn by")
        return healthy(self, rows)

    monkeypatch.setattr(Sampler, "prepare", prepare)
    engine = start(config)
    for number, ids in enumerate(prompts(12)):
        seed = 13 if number == 4 else number
        params = dataclasses.replace(GREEDY, seed=seed)
        engine.add(Request(id=str(number), prompt_ids=ids, params=params))
    found = {int(name): value for (name, _), value in drain(engine).items()}
    assert found.pop(4) == ([], "error")
    expected = alone(config)
    assert {n: tokens for n, (tokens, _) in found.items()} == {n: expected[n] for n in found}
    assert len(found) == 11
