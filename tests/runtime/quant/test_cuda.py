"""The weights of a GPU, with their Triton kernels in the interpreter."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvrun import folder
from kvrun.errors import BadCheckpoint
from kvrun.runtime.device import TRITON
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.quant import _coded, _cuda, _round
from kvrun.runtime.quant._cuda import Fused, Scaled

N, K = 24, 64


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "kernel", lambda name, device: folder.load(TRITON, name))


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got - ref).norm() / ref.norm())


@pytest.mark.parametrize("rows", [1, 6, 300])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("method", ["int4", "int8", "nf4", "fp8"])
def test_products_and_sums(method: str, ordered: bool, rows: int) -> None:
    made = _round.coded(torch.randn(N, K), method)
    if ordered:
        made = made._replace(order=torch.randperm(K))
    values = w4a16.dequantise(made, torch.float32)
    x, add, bias = torch.randn(rows, K), torch.randn(rows, N), torch.randn(N)
    weight = Fused(made, bias)
    ref = F.linear(x, values, bias)
    assert off(weight.matmul(x), ref) < 2e-4
    assert off(weight.matmul(x, add.clone()), ref + add) < 2e-4
    out, kept = torch.empty(rows, N), add.clone()
    assert weight.matmul(x, kept, out) is out
    assert off(out, ref + add) < 2e-4


def test_what_comes_before_is_taken_in_where_it_can_be() -> None:
    made = _round.coded(torch.randn(N, K), "int4")
    weight = Fused(made, None)
    values, norm = w4a16.dequantise(made, torch.float32), torch.rand(K) + 0.5
    x = torch.randn(1, K)
    assert weight.takes_in(1)
    got = weight.matmul(x, norm=norm, eps=1e-5)
    assert off(got, F.rms_norm(x, (K,), norm, 1e-5) @ values.t()) < 2e-4
    assert not weight.takes_in(2)  # tensor cores are faster
    assert not Fused(made._replace(order=torch.randperm(K)), None).takes_in(1)


def test_more_rows_than_a_weight_wants_are_multiplied_as_values() -> None:
    made = _round.coded(torch.randn(N, K), "int8")
    weight = Fused(made, None)
    weight.most = 2
    x = torch.randn(5, K)
    assert off(weight.matmul(x), F.linear(x, w4a16.dequantise(made, torch.float32))) < 1e-6


def scaled_mm(
    x: torch.Tensor,
    codes: torch.Tensor,
    *,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    use_fast_accum: bool,
) -> torch.Tensor:
    """What torch documents of the function of a GPU, for scales of rows and columns."""
    assert codes.stride(0) == 1, "the second matrix lies by columns"
    y = (x.float() * scale_a) @ (codes.float() * scale_b)
    return (y if bias is None else y + bias.float()).to(out_dtype)


@pytest.mark.parametrize(
    ("rows", "before"),
    [(1, ""), (1, "norm"), (1, "act"), (20, ""), (40, ""), (40, "norm"), (40, "act")],
)
def test_8_bits_on_both_sides(monkeypatch: pytest.MonkeyPatch, rows: int, before: str) -> None:
    """Many rows are quantised behind their norm or gate; a few are multiplied as they are, by a
    kernel that takes in what comes before only for the fewest."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    made, bias = _round.coded(torch.randn(32, K), "fp8"), torch.randn(32).bfloat16()
    scaled = Scaled(made, bias)
    assert scaled.takes_in(rows) == (rows != 20)
    assert not Scaled(made._replace(order=torch.randperm(K)), bias).takes_in(rows)
    x, add = torch.randn(rows, K).bfloat16(), torch.randn(rows, 32)
    ref, given = x.float(), dict[str, Any]()
    if before == "norm":
        given = {"norm": torch.rand(K) + 0.5, "eps": 1e-3}
        ref = F.rms_norm(ref, (K,), given["norm"], 1e-3)
    elif before == "act":
        x, given = torch.randn(rows, 2 * K).bfloat16(), {"act": "silu"}
        ref = F.silu(x[:, :K].float()) * x[:, K:].float()
    ref = F.linear(ref, w4a16.dequantise(made, torch.float32), bias.float()) + add
    got = scaled.matmul(x, add.bfloat16(), **given)
    assert off(got.float(), ref) < 0.1  # Triton's interpreter loses more than a GPU


def test_nan_is_no_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = codes[~codes.float().isnan()]
    assert len(finite) == 254
    _coded.refuse_nan(finite)
    for code in (0x7F, 0xFF):
        with pytest.raises(BadCheckpoint, match="NaN"):
            _coded.refuse_nan(codes[code : code + 1])
