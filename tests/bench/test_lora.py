"""bench lora: who gets which adapter, and what stands beside the base model's time."""

from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from kvrun.bench import lora
from kvrun.bench.limits import Limits
from kvrun.bench.progress import Work
from kvrun.bench.roofline import Ceilings
from kvrun.bench.target import Target, find
from kvrun.bench.workloads import uniform
from kvrun.errors import InvalidRequest

OPTIONS: dict[str, Any] = {"repetitions": 2, "seed": 3, "watch": lambda text: None}


def picked(kind: str, count: int = 400, adapters: int = 20) -> list[int]:
    return lora.POPULARITY[kind](count, adapters, Random(5))


def test_popularity() -> None:
    assert set(picked("identical")) == {0}
    assert picked("distinct", 8, 8) == list(range(8))
    assert sorted(set(picked("distinct", 50, 20))) == list(range(20))
    assert len(set(picked("uniform"))) == 20
    counts = [picked("skewed").count(n) for n in range(20)]
    assert counts[0] > 0.3 * 400
    assert counts[0] > counts[1] > counts[5]
    assert picked("skewed") == picked("skewed")
    assert lora.popularity("distinct, identical") == ["distinct", "identical"]
    for wrong in ("", "distinct,popular"):
        with pytest.raises(InvalidRequest, match="--popularity"):
            lora.popularity(wrong)


def test_steps_and_workloads(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        find("tiny", None) as model,
        Target(
            model, device="cpu", prefix_caching=False, max_model_len=64, max_num_seqs=4,
            adapters=lora.adapters(4, 2, "q_proj,v_proj"),
        ) as target,
    ):  # fmt: skip
        asked: list[list[str | None]] = []
        real: Callable[..., float] = target.seconds

        def seconds(prompts: Any, new: Any, adapters: Any) -> float:
            real(prompts, new, adapters)
            asked.append(list(adapters))
            # So that the figures are known: a millisecond for a token, 2 ms with adapters.
            return 1e-3 * new[0] * (2 if any(adapters) else 1)

        monkeypatch.setattr(target, "seconds", seconds)
        limits = Limits(Ceilings(1e9, 1e12))
        rows = list(lora.steps(
            target, [1, 3], ["identical", "distinct"], prompt=4, new=6, limits=limits, **OPTIONS
        ))  # fmt: skip
        assert [(r["popularity"], r["batch_size"], r["adapters"]) for r in rows] == [
            ("base", 1, 0), ("identical", 1, 1), ("distinct", 1, 1),
            ("base", 3, 0), ("identical", 3, 1), ("distinct", 3, 3),
        ]  # fmt: skip
        assert [round(r["base_percent"]) for r in rows] == [100, 50, 50] * 2
        assert rows[-1]["over_base_ms"] == pytest.approx(1)
        one = target.llm.adapters()[0].bytes
        width = 4 if target.ready.dtype == "float32" else 2
        assert one == 9 * 2 * width * (256 + 256 + 256 + 128)
        floors = [r["floor_ms"] for r in rows[3:]]
        assert floors == pytest.approx([0, one * 1e-6, 3 * one * 1e-6])
        assert ["random-0", "random-1", "random-2"] in asked
        work = uniform(4, 4, 6)
        rows = list(lora.throughput(target, work, ["uniform"], limits=limits, **OPTIONS))
        assert [r["popularity"] for r in rows] == ["base", "uniform"]
        assert rows[0]["output_throughput"] == pytest.approx(24 / 6e-3)


def test_every_batch_size_is_captured_before_it_is_measured() -> None:
    """On a GPU: from the most sequences that run at once down to one, on one adapter."""
    asked: list[tuple[int, list[int], set[str]]] = []
    target: Any = SimpleNamespace(
        model=SimpleNamespace(vocab_size=20_000),
        ready=SimpleNamespace(device="cuda:0", max_num_seqs=3),
        llm=SimpleNamespace(adapters=lambda: [SimpleNamespace(name=n, bytes=8) for n in "abc"]),
    )

    def seconds(prompts: Any, new: Any, adapters: Any) -> float:
        asked.append((len(prompts), list(new), set(adapters)))
        return 1.0

    target.seconds = seconds
    work = uniform(5, 4, 6)
    list(lora.throughput(target, work, ["identical"], limits=Limits(), **OPTIONS))
    assert asked[2] == (3, [1, 2, 3], {"c"})
    assert asked[3:] == [(5, [6] * 5, {None}), (5, [6] * 5, {"a"})] * 2


def test_where_nobody_looks_progress_is_lines(capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({}, {"lines": True}, {"lines": True, "shown": False}):
        with Work(**options) as work:
            work.say("uniform, 1/1")
    lines = capsys.readouterr().err.split("\n")
    assert [line.split("  ")[-1] for line in lines if "uniform" in line] == ["uniform, 1/1"]
