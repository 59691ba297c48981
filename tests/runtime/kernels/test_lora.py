"""Changes of adapters: Triton against the twin, the twin against torch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.kernels import lora as twin
from kvrun.runtime.kernels.triton import lora
from kvrun.runtime.lora.resident import _shifted
from kvrun.runtime.lora.rows import tiled
from kvrun.runtime.lora.sites import Sites

K, OUTS = 40, (48, 16, 20)  # no size fills its blocks
RANKS = [(4, 4, 4), (16, 16, 16), (1, 0, 2), (0, 0, 0), (64, 3, 0), (0, 17, 0)]  # by slot, from 1
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """A GPU if there is one: there the same kernels are compiled."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


class Case:
    """Adapters of all RANKS in one arena, rows that use them, and the product they change."""

    def __init__(
        self,
        slots: list[int],
        height: int,
        dtype: torch.dtype = torch.float32,
        **prologue: Any,
    ) -> None:
        sites = Sites([tuple(Shard(str(p), out, K) for p, out in enumerate(OUTS))])
        self.pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        flats, tables, start = [torch.full((8,), torch.nan)], [np.zeros((1, sites.width))], 8
        for slot, ranks in enumerate(RANKS, 1):
            layout = sites.lay_out({(0, part): rank for part, rank in enumerate(ranks) if rank})
            flat = torch.full((layout.size,), torch.nan)  # what is not a matrix must not be read
            self.pairs[slot] = []
            for part in range(len(OUTS)):
                a, b = sites.views(layout, flat, (0, part))
                self.pairs[slot].append((a.normal_(0, 0.3), b.normal_(0, 0.3)))
            flats.append(flat.to(dtype))
            tables.append(_shifted(layout.table, start))
            start += len(flat)
        self.arena = torch.cat(flats)
        rows, tiles = tiled(np.array(slots), height)
        empty = torch.zeros((2, 3), dtype=torch.int32)  # a captured step has room for more
        self.x = torch.randn(len(slots), K).to(dtype)
        self.y = torch.randn(len(slots), sum(OUTS)).to(dtype)
        self.slots, self.dtype = slots, dtype
        self.where = {
            "arena": self.arena.to(dtype),
            "table": torch.tensor(np.concatenate(tables)).long(),
            "rows": torch.tensor(rows),
            "tiles": torch.cat((torch.tensor(tiles), empty)),
        }
        self.sizes = {"height": height, "features": K}
        self.prologue = prologue
        if "norm" in prologue:
            self.prologue = {"norm": torch.rand(K) + 0.5, "eps": 1e-3}

    def run(self, kernel: Any, width: int = 192, expand: Any = None) -> torch.Tensor:
        norm = self.prologue.get("norm")
        sums = kernel.shrink(
            self.x, **self.where, **self.sizes, width=width, parts=len(OUTS), norm=norm
        )
        y = self.y.clone()
        eps = self.prologue.get("eps")
        (expand or kernel).expand(sums, y, **self.where, **self.sizes, outs=OUTS, eps=eps)
        return y

    def plain(self) -> torch.Tensor:
        """The same by ordinary products in fp64."""
        x, y = self.x.double(), self.y.double()
        if "norm" in self.prologue:
            x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3) * self.prologue["norm"]
        for row, slot in enumerate(self.slots):
            at = 0
            for (a, b), out in zip(self.pairs.get(slot, []), OUTS, strict=False):
                y[row, at : at + out] += x[row] @ a.double().t() @ b.double()
                at += out
        return y


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    assert got.shape == ref.shape
    return float((got.double() - ref.double()).norm() / ref.double().norm())


MIXES = {
    "one row": [2],
    "one adapter": [1] * 21,
    "distinct": [1, 2, 3, 4, 5, 6],
    "mixed, with base rows": [0, 5, 1, 1, 0, 3, 2, 5, 5, 6, 1, 4, 0, 2, 5, 1, 1, 1, 5, 5],
}


@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("height", [16, 3, 32])
def test_mixes(slots: list[int], height: int) -> None:
    case = Case(slots, height)
    assert off(case.run(twin), case.plain()) < 1e-6
    assert off(case.run(lora), case.run(twin)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prologue", [{}, {"norm": True}], ids=str)
def test_dtypes_and_prologues(dtype: torch.dtype, prologue: dict[str, Any]) -> None:
    case = Case(MIXES["mixed, with base rows"], 16, dtype, **prologue)
    assert off(case.run(twin), case.plain()) < TOLERANCE[dtype]
    assert off(case.run(lora), case.run(twin)) < TOLERANCE[dtype]


@pytest.mark.parametrize("pieces", [1, 2, 3])
@pytest.mark.parametrize("prologue", [{}, {"norm": True}], ids=str)
def test_cuts_of_the_input(
    pieces: int, prologue: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one turn, in several, and shared by programs: the same to the last rounding."""
    case = Case(MIXES["mixed, with base rows"], 16, **prologue)
    span = -(-K // pieces // 16) * 16 if pieces > 1 else 48
    monkeypatch.setattr(lora, "_cut", lambda *_: (16, span, -(-K // span)))
    assert off(case.run(lora), case.plain()) < 1e-6
    assert torch.equal(case.run(lora), case.run(lora))


@pytest.mark.parametrize("mix", ["one adapter", "mixed, with base rows"])
@pytest.mark.parametrize(("turns", "room"), [(1, 2), (2, 8), (8, 8), (8, 24)])
def test_streams(mix: str, turns: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program goes through several tiles of B, all of them or a share where it has help."""
    monkeypatch.setattr(lora, "_form", lambda *_: lora.Stream(turns, 16))
    monkeypatch.setattr(lora, "_COUNTED", 16)  # 24 and more tiles are not counted
    started: list[Any] = []
    monkeypatch.setattr(lora, "_expand_stream", Watched(lora._expand_stream, started))
    case = Case(MIXES[mix], 16, norm=True)
    case.where["tiles"] = F.pad(case.where["tiles"], (0, 0, 0, room - 2))  # tiles without work
    assert off(case.run(twin, expand=lora), case.plain()) < 1e-6
    assert len(started) == 1


class Watched:
    """A kernel whose launches are listed."""

    def __init__(self, kernel: Any, started: list[Any]) -> None:
        self._kernel, self._started = kernel, started

    def __getitem__(self, grid: Any) -> Any:
        self._started.append(grid)
        return self._kernel[grid]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_streams_in_every_dtype(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(MIXES["mixed, with base rows"], 16, dtype, norm=True)
    monkeypatch.setattr(lora, "_form", lambda *_: lora.Stream(4, 16))
    assert off(case.run(twin, expand=lora), case.run(twin)) < TOLERANCE[dtype]


def test_rows_without_an_adapter_stay_as_they_are() -> None:
    case = Case(MIXES["mixed, with base rows"], 16)
    untouched = [row for row, slot in enumerate(case.slots) if slot in (0, 4)]
    for kernel in (twin, lora):
        found = case.run(kernel)
        assert torch.equal(found[untouched], case.y[untouched])
        assert not torch.isnan(found).any()


def test_tiles_are_by_adapter() -> None:
    rows, tiles = tiled(np.array([2, 0, 1, 2, 2, 0, 1, 2]), 3)
    assert rows.tolist() == [2, 6, 0, 3, 4, 7]
    assert tiles.tolist() == [[1, 0, 2], [2, 2, 3], [2, 5, 1]]
    rows, tiles = tiled(np.array([0, 0]), 3)
    assert rows.tolist() == []
    assert tiles.shape == (0, 3)


def test_a_list_in_plain_order_would_be_seen() -> None:
    """The mutation: tiles that name other rows than their adapter's."""
    case = Case(MIXES["mixed, with base rows"], 16)
    case.where["rows"] = case.where["rows"].flip(0)
    assert off(case.run(lora), case.plain()) > 1e-2
