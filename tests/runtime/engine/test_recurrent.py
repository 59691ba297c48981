"""Recurrent layers in the engine: a state is moved on once for each token, whatever happens."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun.runtime.attention import triton
from kvrun.runtime.cache.states import bytes_per_sequence
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine
from kvrun.runtime.engine.request import Request
from kvrun.runtime.engine.start import start
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.mamba import MambaBlock
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.sampling.sampler import Prepared, Sampler, SampleRow
from tests.runtime.engine import test_same_answers
from tests.runtime.engine.scripted import drain
from tests.runtime.engine.test_same_answers import GREEDY, Answers, answers, prompts

SHAPES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 4, "time_step_rank": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"], "num_hidden_layers": 3,
        "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attention_multiplier": 0.3,
        "max_position_embeddings": 128,
    },
}  # fmt: skip
FAMILIES = list(SHAPES)
_alone: dict[tuple[str, SamplingParams], Answers] = {}


def alone(config: EngineConfig, params: SamplingParams = GREEDY) -> Answers:
    """What each request is answered when nobody else is there; computed once for a model."""
    if (key := (config.model, params)) not in _alone:
        _alone[key] = test_same_answers.alone(config, params)
    return _alone[key]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family, shape in SHAPES.items():
        made[family] = tmp_path_factory.mktemp(family)
        values = {"model_type": family, "vocab_size": 96, "hidden_size": 32,
                  "num_hidden_layers": 2, **shape}  # fmt: skip
        (made[family] / "config.json").write_text(json.dumps(values))
    return made


@pytest.fixture(params=FAMILIES)
def recurrent(
    request: pytest.FixtureRequest, config: EngineConfig, folders: dict[str, Path]
) -> EngineConfig:
    return dataclasses.replace(config, model=str(folders[request.param]), max_model_len=128)


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_batched_and_chunked(recurrent: EngineConfig, run_ahead: int) -> None:
    engine = start(dataclasses.replace(recurrent, run_ahead=run_ahead, max_num_batched_tokens=16))
    expected = alone(recurrent)
    assert len({tuple(tokens) for tokens in expected.values()}) == 12, "the model says one thing"
    assert answers(engine) == expected
    assert answers(engine) == expected, "in slots that were used before"
    assert engine.stats().prefix_hit_tokens == 0


def test_preempted(config: EngineConfig, folders: dict[str, Path]) -> None:
    hybrid = dataclasses.replace(
        config, model=str(folders["granitemoehybrid"]), max_model_len=96, run_ahead=2
    )
    engine = start(dataclasses.replace(hybrid, kv_memory=None, kv_tokens=116))
    assert engine.scheduler.pool.total == 29
    assert answers(engine) == alone(hybrid)
    assert engine.stats().preemptions > 0


@pytest.mark.parametrize("tokens", [8, 128])
def test_choices_each_compute_the_prompt(recurrent: EngineConfig, tokens: int) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=5, n=3, ignore_eos=True)
    engine = start(dataclasses.replace(recurrent, max_num_batched_tokens=tokens))
    ids = prompts(2)[1]
    engine.add(Request(id="all", prompt_ids=ids, params=params))
    found = {index: tokens for (_, index), (tokens, _) in drain(engine).items()}
    assert len({tuple(tokens) for tokens in found.values()}) == 3
    # What each says next after all it has said is what it would say computed from the start.
    for index, said in found.items():
        one = dataclasses.replace(GREEDY, max_tokens=4)
        engine.add(Request(id=f"{index}", prompt_ids=[*ids, *said], params=one))
    together = drain(engine)
    for index, said in found.items():
        fresh = start(recurrent)
        fresh.add(Request(id=f"{index}", prompt_ids=[*ids, *said], params=one))
        assert drain(fresh)[f"{index}", 0] == together[f"{index}", 0]
    logprobs = dataclasses.replace(params, n=1)
    engine.add(Request(id="first", prompt_ids=ids, params=logprobs))
    assert drain(engine)["first", 0][0] == found[0]


def test_a_sampler_that_raises_behind_the_layers(
    recurrent: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers have run for everybody by then, and run again for the halves of the step."""
    healthy, expected = Sampler.prepare, alone(recurrent)
    calls = [0]

    def prepare(self: Sampler, rows: list[SampleRow]) -> Prepared:
        calls[0] += 1
        if calls[0] > 4 and any(row.seed == 13 for row in rows):
            raise RuntimeError("this seed cannot be drawn by")
        return healthy(self, rows)

    monkeypatch.setattr(Sampler, "prepare", prepare)
    engine = start(recurrent)
    for number, ids in enumerate(prompts(12)):
        params = dataclasses.replace(GREEDY, seed=13 if number == 4 else number)
        engine.add(Request(id=str(number), prompt_ids=ids, params=params))
    found = {int(name): value for (name, _), value in drain(engine).items()}
    assert found[4][1] == "error"
    assert {n: tokens for n, (tokens, _) in found.items() if n != 4} == {
        n: tokens for n, tokens in expected.items() if n != 4
    }


@pytest.mark.parametrize("error", [RuntimeError, MemoryError])
def test_steps_that_raise_between_two_layers(
    recurrent: EngineConfig, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """Every seventh step of several sequences ends behind the first layer: nobody is to blame."""
    expected = alone(recurrent)
    kind = Block if "hybrid" in recurrent.model else MambaBlock
    healthy, calls = kind.__call__, [0]

    def call(self: Any, x: torch.Tensor, batch: Any) -> torch.Tensor:
        y = healthy(self, x, batch)
        if self.spec.layer == 0 and len(batch.query_lens_host) > 1:
            calls[0] += 1
            if calls[0] % 7 == 0:
                raise error("now and then")
        return y

    monkeypatch.setattr(kind, "__call__", call)
    engine = start(recurrent)
    assert answers(engine) == expected
    assert engine.stats().failed_steps > 1


def test_what_a_broken_request_leaves_in_its_slot_hurts_nobody(recurrent: EngineConfig) -> None:
    engine, expected = start(recurrent), alone(recurrent)
    cache = engine._runner._states  # type: ignore[attr-defined]
    for tensor in [*cache._windows.values(), *cache._states.values()]:
        tensor.fill_(float("nan"))
    assert answers(engine) == expected


def test_replayed(recurrent: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of single tokens as a GPU captures them; prompts are launched kernel by kernel."""
    expected = alone(recurrent)
    sampled = dataclasses.replace(GREEDY, temperature=0.9, top_p=0.8, seed=3)
    expected_too = alone(recurrent, sampled)
    monkeypatch.setattr(triton.Attention, "reject", staticmethod(lambda spec, device: None))
    engine = start(dataclasses.replace(recurrent, attention="triton", run_ahead=2))
    replays: list[int] = []

    def capture(run: Any) -> Any:
        return lambda: (replays.append(1), run())

    runner: Any = engine._runner
    runner.capture(16, torch.float32, capture)
    assert answers(engine) == expected
    assert answers(engine, sampled) == expected_too
    assert len(replays) > 40
    assert runner.mixed is None


def test_memory_for_states_bounds_how_many_run_at_once(recurrent: EngineConfig) -> None:
    whole: Engine = start(recurrent)
    each = bytes_per_sequence(whole._runner._model.states, torch.float32)  # type: ignore[attr-defined]
    room = 8 * each
    engine = start(dataclasses.replace(recurrent, kv_memory=room))
    assert engine.scheduler._max_seqs < 8 <= whole.scheduler._max_seqs
    held = [*runner_tensors(engine)]
    cache: Any = engine._runner._backend.cache  # type: ignore[attr-defined]
    held += [cache.rows(layer) for layer in cache._layers]
    assert sum(tensor.nbytes for tensor in held) <= room
    found: Answers = answers(engine)
    assert found == alone(recurrent)
    assert "prefixes are not reused" in engine.ready.plan


def runner_tensors(engine: Engine) -> list[torch.Tensor]:
    states: Any = engine._runner._states  # type: ignore[attr-defined]
    return [*states._windows.values(), *states._states.values()]
