"""act(gate) · up: both forms against torch's own activations."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import gated as twin
from kvrun.runtime.kernels.triton import gated as triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Two roundings, and Triton's interpreter cuts bfloat16 off where a device rounds.
# Its numpy warns of overflow where a device goes on with infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
STEPS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
WANTED = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


@pytest.fixture(params=[twin, triton], ids=["twin", "triton"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def test_the_activations_are_these() -> None:
    assert set(twin.ACTIVATIONS) == set(WANTED)


@pytest.mark.parametrize("act", WANTED)
@pytest.mark.parametrize("dtype", STEPS)
@pytest.mark.parametrize(("tokens", "inner"), [(1, 256), (3, 100), (2, 3000), (40, 5)])
def test_gated(kernel: ModuleType, act: str, dtype: torch.dtype, tokens: int, inner: int) -> None:
    both = (torch.randn(tokens, 2 * inner + 16) * 3).to(dtype)[:, : 2 * inner]
    before = both.clone()
    wide = both.double()
    wanted = WANTED[act](wide[:, :inner]) * wide[:, inner:]
    found = kernel.gated(both, act)
    assert found.dtype is dtype
    assert torch.equal(both, before)
    torch.testing.assert_close(found.double(), wanted, rtol=STEPS[dtype], atol=1e-5)


@pytest.mark.parametrize("act", WANTED)
def test_far_values_and_what_is_not_finite(kernel: ModuleType, act: str) -> None:
    gate = [-1e30, -100.0, -9.0, 0.0, 9.0, 100.0, 1e30, float("inf"), float("nan")]
    found = kernel.gated(torch.tensor([[*gate, *[2.0] * 9]]), act)[0]
    wanted = 2 * WANTED[act](torch.tensor(gate))
    torch.testing.assert_close(found[:-2], wanted[:-2], rtol=1e-5, atol=1e-6)
    assert found[-2:].isfinite().tolist() == [False, False]


def test_the_activation_is_rounded_before_the_product(kernel: ModuleType) -> None:
    """In fp16 relu(gate) is exact; silu is not, and 4096 makes its rounding seen."""
    gate = torch.linspace(0.5, 3.0, 64).half()
    up = torch.full((64,), 4096.0, dtype=torch.float16)
    found = kernel.gated(torch.cat((gate, up))[None], "silu")[0]
    assert torch.equal(found, F.silu(gate.float()).half() * up)


def test_out(kernel: ModuleType) -> None:
    both, buffer = torch.randn(3, 20), torch.full((3, 14), 7.0)
    out = buffer[:, 2:12]
    assert kernel.gated(both, "silu", out=out) is out
    torch.testing.assert_close(out, F.silu(both[:, :10]) * both[:, 10:])
    assert (buffer[:, :2] == 7).all()
    assert (buffer[:, 12:] == 7).all()
