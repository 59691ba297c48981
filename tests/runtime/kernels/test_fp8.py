"""Rows in 8 bits: Triton against the twin, the twin against plain torch."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import fp8 as twin
from kvrun.runtime.kernels.triton import fp8

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter loses a carry into the exponent; a GPU rounds as the twin does.
LOST = 0.04 if DEVICE.type == "cuda" else 0.15
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


@pytest.fixture(params=[twin, fp8], ids=["twin", "triton"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def near(
    codes: torch.Tensor, scale: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype
) -> None:
    """Each row by itself: what it may lose is relative to its own values."""
    assert codes.dtype is torch.float8_e4m3fn
    assert scale.shape == (len(wanted), 1)
    largest = wanted.double().abs().amax(1, keepdim=True)
    torch.testing.assert_close(scale.double() * 448, largest, rtol=ROUNDED[dtype], atol=1e-9)
    lost = (codes.double() * scale - wanted).norm(dim=1)
    assert bool((lost <= LOST * wanted.double().norm(dim=1)).all())


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("size", [75, 2048])
def test_rows(kernel: ModuleType, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, size) * torch.tensor([[1.0], [100.0], [0.0], [1e-2], [7.0]])
    x = x.to(dtype)
    codes, scale = kernel.quantise_rows(x)
    near(codes, scale, x, dtype)
    assert not codes[2].float().any()
    assert codes[0].float().abs().max() == 448
    apart = torch.randn(3, size + 24).to(dtype)[:, 8 : 8 + size]
    near(*kernel.quantise_rows(apart), apart, dtype)
    none, scale = kernel.quantise_rows(x[:0])
    assert none.shape == (0, size)
    assert scale.shape == (0, 1)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("rows", [3, 300])
def test_norms(kernel: ModuleType, rows: int, dtype: torch.dtype) -> None:
    x, weight = (torch.randn(rows, 75) * 5).to(dtype), torch.rand(75) + 0.5
    x[1] = 0
    wanted = F.rms_norm(x.float(), (75,), weight, 0.25)
    near(*kernel.quantise_rows(x, norm=weight, eps=0.25), wanted, dtype)


@pytest.mark.parametrize("dtype", ROUNDED, ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_gates(kernel: ModuleType, act: str, dtype: torch.dtype) -> None:
    both = torch.randn(4, 160).to(dtype)[:, 3:153]
    gate, up = both.float().chunk(2, dim=1)
    made = F.silu(gate) if act == "silu" else F.gelu(gate, approximate="tanh")
    near(*kernel.quantise_rows(both, act=act), made * up, dtype)
