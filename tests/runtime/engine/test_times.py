"""How long steps take and what they hold, counted once each; and a cache sized in tokens."""

from dataclasses import replace

import pytest

from kvrun.errors import InvalidRequest, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.request import Seconds
from kvrun.runtime.engine.start import start
from kvrun.runtime.engine.times import StepTimes
from tests.runtime.engine.scripted import ask, drain, prompts, scripted_engine


@pytest.mark.parametrize(("run_ahead", "turns"), [(0, 1), (3, 1), (3, 3)])
def test_every_step_is_counted_once(run_ahead: int, turns: int) -> None:
    engine, runner = scripted_engine(run_ahead=run_ahead, turns=turns)
    for number, prompt in enumerate(prompts(1, 6)):
        engine.add(ask(number, prompt, ignore_eos=True))
    drain(engine)
    stats = engine.stats()
    counted = sum(stats.prompt_steps.counts) + sum(stats.decode_steps.counts)
    assert counted == stats.steps == sum(stats.step_sizes.values())
    assert max(stats.step_sizes) == runner.max_rows
    assert sum(stats.prompt_steps.counts) > 0 < sum(stats.decode_steps.counts)
    known = engine.stats()
    known.step_sizes.clear()
    assert engine.stats().step_sizes == stats.step_sizes  # what was given away is a copy


def test_a_step_that_waited_for_another_counts_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = scripted_engine()
    engine.add(ask(1, [1, 2, 3]))
    schedule = engine.scheduler.schedule()
    stats = engine.scheduler.stats
    times = StepTimes(stats)
    for landed, submitted in ((10.0, 9.0), (10.5, 9.5), (100.0, 99.75)):
        monkeypatch.setattr(times, "now", lambda landed=landed: landed)
        times.took(schedule, submitted)
    assert stats.prompt_steps.sum == 1.0 + 0.5 + 0.25
    reached = [place for place, count in enumerate(stats.prompt_steps.counts) if count]
    assert len(reached) == 3
    for place, seconds in zip(reached, (0.25, 0.5, 1.0), strict=True):
        assert Seconds.BOUNDS[place - 1] < seconds <= Seconds.BOUNDS[place]


def test_a_cache_of_so_many_tokens(config: EngineConfig) -> None:
    sized = replace(config, kv_memory=None, kv_tokens=150)
    assert start(sized).ready.kv_tokens == 152  # whole blocks of 4
    with pytest.raises(InvalidRequest, match="kv_tokens"):
        replace(config, kv_tokens=150)
    with pytest.raises(InvalidRequest, match="kv_tokens"):
        replace(sized, kv_tokens=0)
    with pytest.raises(Unsupported):
        start(replace(sized, kv_tokens=40, max_model_len=64))
