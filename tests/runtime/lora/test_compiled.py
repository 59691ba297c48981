"""Adapters on CPU: which rows the kernel in C takes, which ordinary products; one answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.engine.start import start
from kvrun.runtime.kernels.native import lora
from kvrun.runtime.lora import rows
from kvrun.runtime.lora.bank import LoraBank
from kvrun.runtime.lora.grouped import Grouped
from kvrun.runtime.lora.rows import Compiled
from tests.runtime.lora.adapters import make_bank, ready, write
from tests.runtime.lora.test_engine import CHOICES, Make, ask, run

compiled = pytest.mark.skipif(not lora.available(), reason="there is no C compiler here")
SHAPES = {"q": (24, 40), "k": (8, 40), "v": (8, 40), "o": (40, 24)}
TARGETS = {"all": SHAPES, "o": {"o": SHAPES["o"]}, "k": {"k": SHAPES["k"]}}


@pytest.fixture
def bank(tmp_path: Path) -> LoraBank:
    """A bank with an adapter for each of TARGETS, in slots 1 to 3."""
    return banked(tmp_path, torch.float32)


def banked(folder: Path, dtype: torch.dtype) -> LoraBank:
    qkv, o = (tuple(Shard(name, *SHAPES[name]) for name in part) for part in ("qkv", "o"))
    bank = make_bank([qkv, o], dtype=dtype)
    for seed, (name, shapes) in enumerate(TARGETS.items()):
        write(folder / name, shapes, rank=2 + seed, seed=seed)
        bank.register(name, str(folder / name))
        adapter = bank.find(name)
        assert adapter
        assert ready(bank, adapter, pinned=True).slot == seed + 1
    return bank


def of_step(bank: LoraBank, slots: list[int]) -> Any:
    return rows.rows_of(bank.resident, np.array(slots), lambda *columns: columns)


def changed(found: Any, site: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    low, y = found.shrink(site, x, {}), y.clone()
    if low is not None:
        found.expand(site, low, y, {})
    return y


@compiled
@pytest.mark.parametrize(
    "slots",
    [[1, 2, 3, 0], [1] * 9 + [0] + [2], [0, 3, 0] + [1] * 20 + [2], [2] * 9 + [3] * 9, [3] * 3],
    ids=["few", "many of one", "long, short and none", "many of all", "one part"],
)
def test_both_ways_say_the_same(
    bank: LoraBank, slots: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lora.ROWS, torch.float32, 8)
    found = of_step(bank, slots)
    assert isinstance(found, Compiled)
    for site, (inner, out) in enumerate([(40, 40), (24, 40)]):
        x, y = torch.randn(len(slots), inner), torch.randn(len(slots), out)
        ref = changed(Grouped(bank.resident, np.array(slots)), site, x, y)
        for _ in range(2):  # what was prepared is used again
            torch.testing.assert_close(changed(found, site, x, y), ref, atol=1e-5, rtol=1e-5)


@compiled
def test_who_computes_what(bank: LoraBank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters with many rows are products, all others one call; none where nothing changes."""
    monkeypatch.setitem(lora.ROWS, torch.float32, 2)
    calls: list[str] = []
    add, expand = lora.Change.add, Grouped.expand
    monkeypatch.setattr(lora.Change, "add", lambda *a: (calls.append("C"), add(*a)))
    monkeypatch.setattr(Grouped, "expand", lambda *a: (calls.append("products"), expand(*a)))

    def seen(slots: list[int], site: int) -> list[str]:
        calls.clear()
        x = torch.randn(len(slots), (40, 24)[site])
        changed(of_step(bank, slots), site, x, torch.zeros(len(slots), 40))
        return sorted(calls)

    assert seen([1, 2, 3, 1], 0) == ["C"]
    assert seen([1, 1, 1, 3], 0) == ["C", "products"]
    assert seen([1, 1, 1, 2], 0) == ["products"]  # which has nothing there
    assert seen([1, 1, 1, 2], 1) == ["C", "products"]
    assert seen([2, 2, 2, 2], 0) == []
    assert seen([3, 0, 3, 0], 1) == []


def test_without_a_compiler_and_in_other_dtypes(
    tmp_path: Path, bank: LoraBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(of_step(banked(tmp_path, torch.float16), [1, 0]), Grouped)
    monkeypatch.setattr(rows, "native", lambda name: None)
    assert isinstance(of_step(bank, [1, 0]), Grouped)


@compiled
def test_an_engine_says_the_same_with_and_without(
    config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts in chunks beside single tokens, sums of adapters, rows without one."""
    monkeypatch.setitem(lora.ROWS, torch.float32, 6)
    requests = [ask(n, CHOICES[n % len(CHOICES)]) for n in range(16)]
    calls: list[int] = []
    add = lora.Change.add
    monkeypatch.setattr(lora.Change, "add", lambda *a: (calls.append(len(a[1])), add(*a)))
    found = run(start(config()), requests)
    assert calls
    calls.clear()
    monkeypatch.setattr(rows, "native", lambda name: None)
    assert run(start(config()), requests) == found
    assert not calls
