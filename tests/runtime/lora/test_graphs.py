"""Captured steps with adapters, run by the kernels' twins: the same answers, with and without them.

As in `tests/runtime/engine/test_graphs.py`, a "replay" on CPU runs the step again over the same
tensors: what the tiles, the rows and the slots know is put to the test, not the capture itself.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kvrun.runtime.attention import triton
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine
from kvrun.runtime.engine.graphs import Graphs
from kvrun.runtime.engine.start import start
from kvrun.runtime.lora.rows import Captured
from tests.runtime.lora.test_engine import CHOICES, ask, run

Make = Callable[..., EngineConfig]


@pytest.fixture
def graphed(config: Make, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes engines on the device-side step; lists the replays, True for those with adapters."""
    monkeypatch.setattr(triton.Attention, "reject", staticmethod(lambda spec, device: None))

    def make(turns: int = 1, **changes: Any) -> tuple[Engine, list[bool]]:
        engine = start(config(attention="triton", **changes))
        runner: Any = engine._runner
        replays: list[bool] = []

        def capture(step: Any) -> Any:
            step()  # as the real one does before it captures
            adapted = runner.mixed is not None  # all others are captured at the start
            return lambda: (replays.append(adapted), step())

        runner.capture(16, torch.float32, capture)
        engine.scheduler._turns, engine.scheduler._many = turns, 1
        return engine, replays

    return make


def work(count: int, choices: list[Any] = CHOICES) -> list[Any]:
    return [ask(n, choices[n % len(choices)], max_tokens=8 + n % 7) for n in range(count)]


@pytest.mark.parametrize(("run_ahead", "turns"), [(0, 1), (2, 1), (4, 3)])
def test_answers_are_the_same(graphed: Any, config: Make, run_ahead: int, turns: int) -> None:
    expected = run(start(config()), work(20))
    engine, replays = graphed(turns, run_ahead=run_ahead)
    assert run(engine, work(20), every=2) == expected
    assert run(engine, work(20), every=0) == expected, "from the prefix cache, in slots used before"
    assert replays.count(True) > 20
    assert len(engine._runner.graphs._adapted) > 2
    assert engine._runner.mixed._adapted


def test_a_batch_without_adapters_replays_plain_steps(graphed: Any) -> None:
    engine, replays = graphed()
    run(engine, work(6, [None]))
    assert not any(replays)
    run(engine, work(6, ["four", None]))
    assert any(replays)
    replays.clear()
    run(engine, work(6, [None]))
    assert replays
    assert not any(replays)


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_kinds_that_no_graph_knows_take_steps_of_their_own(
    graphed: Any, config: Make, kinds: dict[str, str], run_ahead: int
) -> None:
    """And what comes before and behind them is replayed."""
    several = work(16, ["four", None, "dora", "tables", "four", None, None, "saved"])
    expected = run(start(config(adapters=kinds)), several)
    engine, replays = graphed(2, run_ahead=run_ahead, adapters=kinds)
    assert run(engine, several, every=5) == expected
    assert replays
    replays.clear()
    run(engine, work(4, ["dora"]))
    assert not replays


@torch.inference_mode()
def test_few_rows_share_no_tile(graphed: Any) -> None:
    engine, _ = graphed()
    lora, send = engine._runner.graphs._lora, engine._runner._slots.send
    for rows, tiles in (([2] * 8 + [0] * 3, 8), ([2] * 9, 1), ([2, 3, 3], 3), ([0], 0)):
        lora.show(np.array(rows), send)
        assert len(lora.rows(16, 16)._tiles.unique(dim=0)) == tiles + (tiles < 16)
        assert lora.few(16) == (tiles <= 4)


@pytest.mark.parametrize("run_ahead", [0, 2])
def test_evictions_reach_the_captured_steps(graphed: Any, config: Make, run_ahead: int) -> None:
    """One adapter after the other in the same slot of the table, in the same place of a batch."""
    expected = run(start(config()), work(16))
    size = max(info.bytes for info in start(config()).adapters())
    engine, _ = graphed(lora_memory=size, run_ahead=run_ahead)
    assert run(engine, work(16), every=0) == expected


def test_stale_tiles_would_be_seen(
    graphed: Any, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: a step is replayed with the rows that another batch has shown."""
    expected = run(start(config()), work(20))
    real, shown = Captured.show, [0]

    def seldom(self: Captured, *arguments: Any) -> None:
        shown[0] += 1
        if shown[0] % 3:
            real(self, *arguments)

    monkeypatch.setattr(Captured, "show", seldom)
    engine, _ = graphed()
    assert run(engine, work(20), every=2) != expected


def test_a_place_taken_again_would_be_seen(
    graphed: Any, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutation: the same rows are taken for the same batch, whatever adapters they have."""
    expected = run(start(config()), work(12, ["sixteen", "eight"]))
    real = Graphs._show

    def forgets(self: Graphs, rows: Any, adapters: Any = None) -> None:
        if not rows or rows != self._rows or self._adapters is None:
            real(self, rows, adapters)

    monkeypatch.setattr(Graphs, "_show", forgets)
    engine, _ = graphed(max_num_seqs=1)
    engine._runner.mixed = None
    assert run(engine, work(12, ["sixteen", "eight"]), every=0) != expected
