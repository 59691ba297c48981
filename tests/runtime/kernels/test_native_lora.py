"""What adapters add to a product, by the kernel in C: as its twin says, of any mix of rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kvrun.runtime.kernels import lora as twin
from kvrun.runtime.kernels.native import _build, lora
from tests.runtime.kernels import test_lora
from tests.runtime.kernels.test_lora import MIXES, Case, off

pytestmark = pytest.mark.skipif(not lora.available(), reason="there is no C compiler here")
# Of the twin, which adds up in another order; a sum of A may be rounded to its neighbour.
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
HALVES = {"one": [2, 2], "two": [1, 1, 5, 5], "three": [5, 5, 5, 0], "four": [1, 1, 1, 1, 5]}


def change(case: Case, width: int = 192) -> Any:
    outs = test_lora.OUTS
    return lora.Change(**case.where, features=test_lora.K, outs=outs, width=width)


def changed(case: Case, width: int = 192) -> torch.Tensor:
    y = case.y.clone()
    change(case, width).add(case.x, y)
    return y


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("slots", [*MIXES.values(), *HALVES.values()], ids=[*MIXES, *HALVES])
@pytest.mark.parametrize("height", [lora.HEIGHT, 1])
def test_mixes(slots: list[int], height: int, dtype: torch.dtype) -> None:
    """Of all ranks, of parts without one, of rows without an adapter; tiles of every height."""
    case = Case(slots, height, dtype)
    assert off(changed(case), case.run(twin)) < CLOSE[dtype]
    assert off(changed(case), case.plain()) < test_lora.TOLERANCE[dtype]
    untouched = [row for row, slot in enumerate(slots) if slot in (0, 4)]
    assert torch.equal(changed(case)[untouched], case.y[untouched])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize(
    ("features", "outs"),
    [(7, (3,)), (32, (64, 32)), (200, (1, 70)), (1000, (1100, 130, 2048)), (33, (16,) * 5)],
)
def test_sizes(
    features: int, outs: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ends of rows in every place, several turns of one part; one thread or two."""
    monkeypatch.setattr(test_lora, "K", features)
    monkeypatch.setattr(test_lora, "OUTS", outs)
    ranks = [(*some, 5, 0)[: len(outs)] for some in test_lora.RANKS]
    monkeypatch.setattr(test_lora, "RANKS", ranks)
    case = Case(MIXES["mixed, with base rows"], lora.HEIGHT, dtype)
    found = changed(case)
    assert off(found, case.run(twin)) < CLOSE[dtype]
    monkeypatch.setattr(lora, "_ALONE", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(changed(case), found)
    finally:
        torch.set_num_threads(threads)


def test_a_row_is_the_same_alone() -> None:
    slots = MIXES["mixed, with base rows"]
    case = Case(slots, lora.HEIGHT)
    found = changed(case)
    for row in range(len(slots)):
        where = {"rows": torch.tensor([row]), "tiles": torch.tensor([[slots[row], 0, 1]])}
        case.where |= {name: part.int() for name, part in where.items()}
        assert torch.equal(changed(case)[row], found[row])


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_rows_that_lie_apart(dtype: torch.dtype) -> None:
    """In columns of something wider; where values are not side by side the twin adds them."""
    case = Case(MIXES["mixed, with base rows"], lora.HEIGHT, dtype)
    wanted, whole = changed(case), torch.full((len(case.y), 100), 7.0, dtype=dtype)
    x, y = torch.randn(len(case.x), 60).to(dtype), whole[:, 4:88]
    x[:, 9:49], y[:] = case.x, case.y
    change(case).add(x[:, 9:49], y)
    assert torch.equal(y, wanted)
    assert (whole[:, :4] == 7).all()
    assert (whole[:, 88:] == 7).all()
    for turned in ("x", "y"):
        x, y = (part.t().contiguous().t() for part in (case.x, case.y))
        x, y = (x, case.y.clone()) if turned == "x" else (case.x, y)
        change(case).add(x, y)
        assert off(y, wanted) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(value: float, dtype: torch.dtype) -> None:
    case = Case([2, 2, 1], lora.HEIGHT, dtype)
    case.x[0, 33] = value
    found = changed(case)
    assert not found[0].isfinite().any()
    assert found[1:].isfinite().all()


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs an x86 Linux")
def test_other_cpus(level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms for smaller registers give the sums of this CPU's form."""
    cases = [Case(MIXES["mixed, with base rows"], lora.HEIGHT, dtype) for dtype in CLOSE]
    here = [changed(case) for case in cases]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [f"-march={level}" if f == "-march=native" else f for f in _build.FLAGS]
    monkeypatch.setattr(_build, "FLAGS", ["-O1", *flags[1:]])
    lora._library.cache_clear()
    try:
        there = [changed(case) for case in cases]
    finally:
        lora._library.cache_clear()
    assert len(list((tmp_path / "kvrun").iterdir())) == 1  # compiled anew
    assert_close(here[0], there[0], rtol=1e-5, atol=1e-5)
    assert off(there[1], here[1]) < CLOSE[torch.bfloat16]
