"""Norms of rows, with and without the residual stream: both forms against the plain definition."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from kvrun.runtime.kernels import norm as twin
from kvrun.runtime.kernels.triton import norm as triton
from kvrun.runtime.layers.norm import RMSNorm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Triton's interpreter cuts bfloat16 off where a device rounds.
STEPS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FLOATS = list(STEPS)
EPS = 1e-5


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


@pytest.fixture(params=[twin, triton], ids=["twin", "triton"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def close(found: torch.Tensor, wanted: torch.Tensor, roundings: int = 1) -> None:
    step = roundings * STEPS[found.dtype]
    torch.testing.assert_close(found.double(), wanted.double(), rtol=step, atol=step / 2)


def strided(tokens: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(tokens, size + 24) * 3).to(dtype)[:, 8 : 8 + size]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "size"), [(1, 64), (5, 100), (3, 1536), (2, 4096)])
def test_rms_norm(kernel: ModuleType, dtype: torch.dtype, tokens: int, size: int) -> None:
    x, weight = strided(tokens, size, dtype), torch.rand(size) + 0.5
    x[-1] *= 1e-3  # eps counts here
    before = x.clone()
    found = kernel.rms_norm(x, weight, EPS)
    assert found.dtype is dtype
    assert found.is_contiguous()
    assert torch.equal(x, before)
    close(found, normed(x, weight))
    close(found, RMSNorm(weight, EPS)(x), 2)


def test_several_rows_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "shape", lambda tokens, size: (4, 4))
    x, residual, weight = torch.randn(7, 50), torch.randn(7, 50), torch.rand(50)
    total = x + residual
    out = torch.full((8, 50), 7.0)
    triton.add_rms_norm(x, residual, weight, EPS, out=out[:7])
    close(residual, total)
    close(out[:7], normed(total, weight))
    assert (out[7] == 7).all()
    again, stream = torch.full((8, 50), 7.0), total.clone()
    found = triton.norm_add_norm(total, weight, EPS, again[:7], weight, EPS)
    close(again[:7], 7 + normed(stream, weight), 4)
    close(found, normed(again[:7], weight))
    assert (again[7] == 7).all()


@pytest.mark.parametrize("in_place", [False, True])
def test_rms_norm_writes_to_out_alone(kernel: ModuleType, in_place: bool) -> None:
    buffer, weight = torch.randn(4, 40), torch.rand(24)
    before = buffer.clone()
    x = buffer[:, 8:32]
    out = x if in_place else torch.full((4, 30), 7.0)[:, 3:27]
    assert kernel.rms_norm(x, weight, EPS, out=out) is out
    close(out, normed(before[:, 8:32], weight))
    if in_place:
        before[:, 8:32] = out
    else:
        assert (out._base[:, :3] == 7).all()
        assert (out._base[:, 27:] == 7).all()
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "size"), [(1, 256), (3, 300)])
def test_add_rms_norm(kernel: ModuleType, dtype: torch.dtype, tokens: int, size: int) -> None:
    x, residual = strided(tokens, size, dtype), strided(tokens, size, dtype)
    weight, total = torch.rand(size) + 0.5, x.double() + residual.double()
    found = kernel.add_rms_norm(x, residual, weight, EPS)
    close(residual, total)
    close(found, normed(residual, weight))  # of the sum as it was rounded
    again = torch.zeros_like(residual)
    assert kernel.add_rms_norm(residual, again, weight, EPS, out=residual) is residual
    assert torch.equal(residual, found)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "size"), [(1, 256), (3, 300)])
def test_norm_add(kernel: ModuleType, dtype: torch.dtype, tokens: int, size: int) -> None:
    x, residual = strided(tokens, size, dtype), strided(tokens, size, dtype)
    weight, before, stream = torch.rand(size) + 0.5, x.clone(), residual.double()
    assert kernel.norm_add(x, weight, EPS, residual) is residual
    assert torch.equal(x, before)
    close(residual, stream + normed(x, weight).to(dtype).double(), 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "size"), [(1, 256), (3, 300), (65, 1100)])
def test_norm_add_norm(kernel: ModuleType, dtype: torch.dtype, tokens: int, size: int) -> None:
    x, residual = strided(tokens, size, dtype), strided(tokens, size, dtype)
    residual[-1] = -x[-1] * 1e-3  # both eps count here, each its own
    x[-1] *= 1e-3
    weight, after = torch.rand(size) + 0.5, torch.rand(size) + 0.5
    before, stream, around = x.clone(), residual.double(), residual._base[:, :8].clone()
    found = kernel.norm_add_norm(x, weight, EPS, residual, after, 100 * EPS)
    assert found.dtype is dtype
    assert found.is_contiguous()
    assert torch.equal(x, before)
    assert torch.equal(residual._base[:, :8], around)
    close(residual, stream + normed(x, weight).to(dtype).double(), 8)
    close(found, normed(residual, after, 100 * EPS))  # of the sum as it was rounded


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("tokens", "size"), [(1, 100), (3, 2304), (65, 300)])
def test_the_stream_is_what_norm_add_makes_of_it(
    kernel: ModuleType, dtype: torch.dtype, tokens: int, size: int
) -> None:
    x = strided(tokens, size, dtype).round()  # sums of their squares are exact in any order
    residual = strided(tokens, size, dtype)
    mine, weight, after = residual.clone(), torch.rand(size) + 0.5, torch.rand(size) + 0.5
    found = kernel.norm_add_norm(x, weight, EPS, residual, after, 2 * EPS)
    assert torch.equal(residual, kernel.norm_add(x, weight, EPS, mine))
    close(found, kernel.rms_norm(mine, after, 2 * EPS))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_that_is_not_finite_spoils_no_other(kernel: ModuleType) -> None:
    x, weight = torch.randn(4, 50), torch.rand(50)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    found = kernel.rms_norm(x, weight, EPS)
    close(found[::3], normed(x[::3], weight))
    assert found[1].isnan().all()
    assert found[2, 0].isnan()


def test_zeros_stay_zeros(kernel: ModuleType) -> None:
    assert not kernel.rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).any()
