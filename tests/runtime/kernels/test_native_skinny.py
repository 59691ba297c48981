"""Products of few rows in C against their twin in plain torch."""

from typing import Any

import pytest
import torch

from kvrun.runtime.kernels import skinny as twin
from kvrun.runtime.kernels.native import skinny
from tests.runtime.kernels.test_skinny import off

pytestmark = pytest.mark.skipif(not skinny.available(), reason="there is no C compiler here")
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 4e-3}
OPTIONS: list[dict[str, Any]] = [
    {}, {"bias": True, "add": True}, {"norm": True, "bias": True}, {"act": "silu", "add": True},
    {"act": "gelu"}, {"gated": "silu", "norm": True}, {"gated": "gelu_tanh"}, {"gated": "relu"},
]  # fmt: skip


def arguments(m: int, n: int, k: int, dtype: torch.dtype, **options: Any) -> dict[str, Any]:
    """Fresh random arguments of the twin; `norm`, `bias`, `add` = True are replaced by tensors."""
    x = torch.randn(m, 2 * k if "act" in options else k).to(dtype)
    given = {"x": x, "weight": torch.randn(n, k).div(3).to(dtype), **options}
    if "norm" in given:
        given |= {"norm": torch.rand(k) + 0.5, "eps": 1e-3}
    for name, shape in (("bias", (n,)), ("add", (m, n))):
        if name in given:
            given[name] = torch.randn(shape).to(dtype)
    return given


def run(weight: torch.Tensor, x: torch.Tensor, **options: Any) -> torch.Tensor:
    return skinny.Matrix(weight, options.pop("bias", None)).linear(x, **options)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("n", "k"), [(2, 3), (16, 16), (38, 100), (130, 256)])
def test_products(n: int, k: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Ends of rows and of outputs in every place; one row, pairs and what is left of them."""
    for rows in (1, 2, 5):
        given = arguments(rows, n, k, dtype, **options)
        assert off(run(**given), twin.linear(**given)) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_a_sum_in_place(dtype: torch.dtype) -> None:
    given = arguments(3, 38, 100, dtype, add=True)
    ref = twin.linear(**given)
    assert run(**given, out=given["add"]) is given["add"]
    assert off(given["add"], ref) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_threads_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(4, 90, 100, dtype, gated="silu", norm=True)
    alone = run(**given)
    monkeypatch.setattr(skinny, "_ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(run(**given), alone)


def test_one_bad_row_stays_alone() -> None:
    given = arguments(3, 38, 100, torch.float32, norm=True)
    ref = twin.linear(**given)
    given["x"][1, 7] = float("inf")
    got = run(**given)
    assert got[1].isnan().all()
    assert off(got[::2], ref[::2]) < 1e-6
