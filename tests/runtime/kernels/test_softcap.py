"""c·tanh(x / c): both forms against the formula in double precision."""

from types import ModuleType

import pytest
import torch

from kvrun.runtime.kernels import softcap as twin
from kvrun.runtime.kernels.triton import softcap as triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[twin, triton], ids=["twin", "triton"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 5), (3, 2048), (2, 5000)])
def test_softcap(kernel: ModuleType, dtype: torch.dtype, rows: int, vocab: int) -> None:
    torch.manual_seed(0)
    x = (torch.randn(rows, vocab + 8, device=DEVICE) * 20).to(dtype)[:, :vocab]
    before = x.clone()
    wanted = 7.0 * torch.tanh(x.double() / 7.0)
    torch.testing.assert_close(kernel.softcap(x, 7.0).double(), wanted, rtol=1e-5, atol=1e-5)
    out = torch.full((rows + 1, vocab), 3.0, device=DEVICE)
    assert kernel.softcap(x, 7.0, out=out[:rows]).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out[:rows].double(), wanted, rtol=1e-5, atol=1e-5)
    assert (out[rows] == 3.0).all()
    assert torch.equal(x, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities in the interpreter
def test_what_is_not_finite(kernel: ModuleType) -> None:
    inf, nan = float("inf"), float("nan")
    found = kernel.softcap(torch.tensor([[inf, -inf, nan, 1e30]], device=DEVICE), 2.0)[0]
    assert found[:2].tolist() == [2.0, -2.0]
    assert found[2].isnan()
    assert found[3] == 2.0
