"""Products of every number of rows on a CUDA device, in the form each chooses itself."""

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.quant import dense

pytestmark = pytest.mark.gpu

CLOSE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}  # a rounding of each
# Every kind of form: see _skinny_forms.py.
SHAPES = [(4096, 1032), (1032, 4104), (1024, 2048), (4096, 2304), (18432, 2304), (6144, 1024),
          (1024, 8200), (28672, 4096), (4096, 14336)]  # fmt: skip


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    n, k = shape
    weight = torch.randn(n, k, device="cuda").div_(k**0.5).to(dtype)
    bias = torch.randn(n, device="cuda").to(dtype)
    plain, biased = dense.lay_out(weight), dense.lay_out(weight, bias)
    for rows in (1, 4, 5, 16, 17, 31, 32, 33, 64, 65, 200):
        x, add = (torch.randn(rows, size, device="cuda").to(dtype) for size in (k, n))
        wanted = F.linear(x.double(), weight.double())
        found = biased.matmul(x, add.clone())
        assert off(plain.matmul(x), wanted) < CLOSE[dtype], rows
        assert off(found, wanted + bias.double() + add.double()) < CLOSE[dtype], rows
        if plain.gates(rows):
            gate, up = wanted.chunk(2, 1)
            found = plain.matmul(x, gated="silu")
            assert off(found, F.silu(gate) * up) < 2 * CLOSE[dtype], rows


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.shape == wanted.shape
    return float((found.double() - wanted).norm() / wanted.norm())
