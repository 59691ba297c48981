"""Routers, and experts read from the forms in which files hold them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.layers import moe
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.parallel import Group
from tests.runtime.layers.test_parts import stored

NOBODY: Any = SimpleNamespace(lora=None)
HIDDEN, INNER, COUNT = 8, 6, 4


def test_the_likeliest_experts_weigh_what_their_chances_are() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    chances = logits.softmax(-1)[0]
    weights, chosen = moe.softmax_top(2)(logits)
    assert chosen.tolist() == [[1, 2]]
    torch.testing.assert_close(weights[0], chances[[1, 2]])
    ones, _ = moe.softmax_top(2, normalise=1)(logits)
    assert float(ones.sum()) == pytest.approx(1.0)
    squares, _ = moe.softmax_top(2, normalise=2)(logits)
    assert float(squares.square().sum()) == pytest.approx(1.0)


def test_a_softmax_of_the_chosen_alone() -> None:
    weights, chosen = moe.top_softmax(2)(torch.tensor([[0.0, 1.0, 3.0]]))
    assert chosen.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[3.0, 1.0]]).softmax(-1))


@pytest.mark.parametrize(("best", "kept"), [(1, [0, 1]), (2, [2, 3])])
def test_groups_are_ranked_by_their_best(best: int, kept: list[int]) -> None:
    """The first group has the best expert, the second the best two."""
    scores = torch.tensor([[0.9, 0.0, 0.6, 0.5, 0.1, 0.1]])
    found = moe.in_best_groups(scores, 3, 1, best)[0]
    assert torch.isfinite(found).nonzero().flatten().tolist() == kept
    assert torch.equal(found[kept], scores[0, kept])


def test_all_groups_change_nothing() -> None:
    scores = torch.rand(3, 6)
    assert moe.in_best_groups(scores, 2, 2, 1) is scores


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    return {
        f"e__{n}__{part}__weight": torch.randn(shape)
        for n in range(COUNT)
        for part, shape in shapes.items()
    }


def stack(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = {
        part: torch.stack([tensors[f"e__{n}__{part}__weight"] for n in range(COUNT)])
        for part in ("gate", "up", "down")
    }
    return {"gu": torch.cat((parts["gate"], parts["up"]), 1), "d": parts["down"]}


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_listed_and_stacked_experts_are_the_same(
    tmp_path: Path, tensors: dict[str, torch.Tensor], rank: int | None
) -> None:
    sizes: Any = {"count": COUNT, "hidden": HIDDEN, "inner": INNER, "act": "silu"}
    w = stored(tmp_path, **tensors, **stack(tensors))
    if rank is not None:
        w.group = Group(rank, 2)
    listed = moe.listed(w, "e", ("gate", "up", "down"), **sizes)
    stacked = moe.stacked(w, "gu", "d", **sizes)
    w.close()
    assert torch.equal(listed.gate_up, stacked.gate_up)
    assert torch.equal(listed.down, stacked.down)
    mine = slice(None) if rank is None else slice(rank * INNER // 2, (rank + 1) * INNER // 2)
    assert torch.equal(listed.down[2], tensors["e__2__down__weight"][:, mine])
    gate, up = listed.gate_up[1].chunk(2)
    assert torch.equal(gate, tensors["e__1__gate__weight"][mine])
    assert torch.equal(up, tensors["e__1__up__weight"][mine])


@pytest.mark.parametrize("wide", [False, True])
def test_experts_a_shared_one_and_the_residual(
    tmp_path: Path, tensors: dict[str, torch.Tensor], wide: bool
) -> None:
    router = torch.randn(COUNT, HIDDEN)
    parts = ("gate", "up", "down")
    shared = {f"s__{n}__weight": tensors[f"e__0__{n}__weight"].clone() for n in parts}
    w = stored(tmp_path, **tensors, **shared, r__weight=router)
    sizes: Any = {"hidden": HIDDEN, "inner": INNER, "act": "silu"}
    experts = moe.listed(w, "e", parts, count=COUNT, **sizes)
    mlp = GatedMLP(w, ("s.gate", "s.up"), "s.down", **sizes)
    layer = moe.MoE(w, "r", moe.top_softmax(2), experts, wide=wide, shared=mlp)
    w.close()
    x, add = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)

    def one(row: torch.Tensor, n: int) -> torch.Tensor:
        gate, up, down = (tensors[f"e__{n}__{part}__weight"] for part in parts)
        y: torch.Tensor = down @ (F.silu(gate @ row) * (up @ row))
        return y

    wanted = []
    for row in x:
        weights, chosen = (router @ row).topk(2)
        each = [p * one(row, n) for p, n in zip(weights.softmax(0), chosen.tolist(), strict=True)]
        wanted.append(sum(each) + one(row, 0))
    found = layer(x, NOBODY)
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(x, NOBODY, add.clone()), found + add, rtol=1e-4, atol=1e-4)
