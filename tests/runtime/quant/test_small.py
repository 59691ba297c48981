"""Small matrices on CPU: which rows the kernel in C has, and what it does with odd layouts."""

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels.native import skinny
from kvrun.runtime.quant import dense
from kvrun.runtime.quant._small import LARGEST, Small, takes

pytestmark = pytest.mark.skipif(not skinny.available(), reason="there is no C compiler here")
N, K = 48, 40


@pytest.fixture
def weight() -> torch.Tensor:
    """Rows apart from each other."""
    torch.manual_seed(0)
    return torch.randn(N, K + 8)[:, :K]


def small(weight: torch.Tensor, bias: torch.Tensor | None = None) -> Small:
    made = dense.lay_out(weight, bias)
    assert isinstance(made, Small)
    return made


def test_what_is_small() -> None:
    assert takes(torch.empty(1, LARGEST))
    assert takes(torch.empty(8, 8, dtype=torch.bfloat16))
    assert not takes(torch.empty(1, LARGEST + 1))
    assert not takes(torch.empty(0, 8))
    assert not takes(torch.empty(8, 8, dtype=torch.float16))


@pytest.mark.parametrize("bias", [None, torch.randn(N)])
def test_few_rows_and_more(weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    made = small(weight, bias)
    for rows in (1, 8, 9):
        x, add = torch.randn(rows, K), torch.randn(rows, N)
        wanted = F.linear(x, weight, bias)
        wide = torch.zeros(rows, N + 3)[:, :N]
        assert made.matmul(x, None, wide) is wide
        for found, more in ((made.matmul(x), 0), (made.matmul(x, add.clone()), add), (wide, 0)):
            torch.testing.assert_close(found, wanted + more, rtol=1e-5, atol=1e-5)
        apart = torch.randn(rows, N + 3)[:, :N]
        torch.testing.assert_close(made.matmul(x, apart), wanted + apart, rtol=1e-5, atol=1e-5)
        turned = x.t().contiguous().t()
        torch.testing.assert_close(made.matmul(turned), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        made.matmul(x.bfloat16()[:1])
    assert made.plain() is not weight
    assert torch.equal(made.plain(), weight)


def test_what_it_takes_in(weight: torch.Tensor) -> None:
    """A bias belongs to gates and ups before the gate, which the kernel would add behind it."""
    assert [rows for rows in (1, 2, 8, 9) if small(weight).takes_in(rows)] == [1, 2, 8]
    assert [rows for rows in (1, 2, 8, 9) if small(weight).gates(rows)] == [1, 2, 8]
    assert not small(weight, torch.randn(N)).gates(1)
    half = small(weight.bfloat16())
    assert [rows for rows in (1, 2) if half.takes_in(rows)] == [1]
