"""A sandwich of norms: one kernel between attention and MLP, or each norm by itself."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvrun import folder
from kvrun.runtime.device import TRITON
from kvrun.runtime.kernels.triton import norm as triton
from kvrun.runtime.layers import norm as layer
from kvrun.runtime.layers.block import Sandwich
from kvrun.runtime.layers.norm import LayerNorm, Norm, RMSNorm

SIZE = 100
NOBODY: Any = SimpleNamespace(lora=None)
# What stands before the MLP.
BEFORE = {
    "rms": lambda: RMSNorm(torch.rand(SIZE) + 0.5, 1e-2),
    "layer": lambda: LayerNorm(torch.rand(SIZE) + 0.5, torch.randn(SIZE), 1e-5),
    "none": lambda: None,
}


class Part:
    """tanh(x · weight), as a norm behind it would hide its scale; notes what norm it is given."""

    spec: Any = None

    def __init__(self) -> None:
        self._weight = torch.randn(SIZE, SIZE) / SIZE**0.5
        self.norms: list[Norm | None] = []

    def __call__(
        self, x: torch.Tensor, batch: Any, add: Any = None, norm: Norm | None = None
    ) -> torch.Tensor:
        assert add is None
        self.norms.append(norm)
        return ((x if norm is None else norm(x)) @ self._weight).tanh()


def made(before: str) -> tuple[Sandwich, Part]:
    """The same each time, with the kernels of that time."""
    torch.manual_seed(0)
    first, behind, last = (RMSNorm(torch.rand(SIZE) + 0.5, 1e-5) for _ in range(3))
    attention, mlp = Part(), Part()
    return Sandwich(first, attention, behind, BEFORE[before](), mlp, last), mlp


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Norms made from here on are a GPU's; rows of each call of the kernel of both norms."""
    calls, both = [], triton.norm_add_norm

    def counted(x: torch.Tensor, *given: Any) -> torch.Tensor:
        calls.append(len(x))
        return both(x, *given)

    monkeypatch.setattr(triton, "norm_add_norm", counted)
    monkeypatch.setattr(layer, "fused", lambda name, device: folder.load(TRITON, name))
    return calls


def written_out(block: Sandwich, x: torch.Tensor) -> torch.Tensor:
    first, behind, before, last = block.norms
    x = x + behind(block._attention(first(x), NOBODY))
    return x + last(block._mlp(x if before is None else before(x), NOBODY))


@pytest.mark.parametrize("rows", [1, 3, 65])
@pytest.mark.parametrize("before", BEFORE)
def test_a_sandwich_is_the_same_by_one_kernel(before: str, rows: int, calls: list[int]) -> None:
    block, mlp = made(before)
    x = torch.randn(rows, SIZE)
    wanted, stream = written_out(block, x), x.clone()
    mlp.norms.clear()
    found = block(stream, NOBODY)
    assert found is stream
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert calls == ([rows] if before == "rms" else [])
    assert mlp.norms == [block.norms[2] if before == "layer" else None]


def test_on_a_cpu_each_norm_is_by_itself() -> None:
    block, mlp = made("rms")
    x = torch.randn(3, SIZE)
    wanted = written_out(block, x)
    mlp.norms.clear()
    torch.testing.assert_close(block(x, NOBODY), wanted, rtol=1e-5, atol=1e-5)
    assert mlp.norms == [block.norms[2]]


class Changes:
    """Other weights for row 1 of one norm."""

    def __init__(self, site: int, weight: torch.Tensor) -> None:
        self._site, self._change = site, (torch.tensor([1]), weight, None)

    def norms(self, site: int, rows: Any) -> list[Any]:
        return [self._change] if site == self._site else []


@pytest.mark.parametrize("changed", [1, 2])
def test_a_norm_that_an_adapter_changes_is_by_itself(changed: int, calls: list[int]) -> None:
    block, _ = made("rms")
    for site, norm in enumerate(block.norms):
        norm.site = site  # type: ignore[union-attr]
    weight, x = torch.rand(SIZE) + 0.5, torch.randn(3, SIZE)
    other, _ = made("rms")
    norms = list(other.norms)
    norms[changed] = RMSNorm(weight, norms[changed].eps)  # type: ignore[union-attr]
    other.norms = tuple(norms)
    wanted = written_out(block, x)
    wanted[1] = written_out(other, x)[1]
    batch: Any = SimpleNamespace(lora=SimpleNamespace(extra=Changes(changed, weight)))
    torch.testing.assert_close(block(x.clone(), batch), wanted, rtol=1e-5, atol=1e-5)
    assert calls == []
    batch.lora.extra = Changes(-1, weight)  # none of these
    block(x, batch)
    assert calls == [3]
