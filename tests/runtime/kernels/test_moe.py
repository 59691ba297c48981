"""Experts: both forms against each token's own MLPs."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import moe as twin
from kvrun.runtime.kernels.triton import moe as triton
from kvrun.runtime.kernels.w4a16 import Coded, dequantise
from kvrun.runtime.quant import _coded, _round, _stack
from kvrun.runtime.quant._tables import E2M1

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.04, torch.float16: 0.005}


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


@pytest.fixture(params=[twin, triton], ids=["twin", "triton"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def inputs(
    tokens: int, count: int, experts: int, dtype: torch.dtype, *, bias: bool = False
) -> dict[str, Any]:
    hidden, inner = 40, 24
    values = {
        "x": torch.randn(tokens, hidden),
        "gate_up": torch.randn(experts, 2 * inner, hidden) * 0.2,
        "down": torch.randn(experts, hidden, inner) * 0.2,
    }
    if bias:
        values["gate_up_bias"] = torch.randn(experts, 2 * inner)
        values["down_bias"] = torch.randn(experts, hidden)
    scores = torch.rand(tokens, experts)
    weights, chosen = scores.topk(count)
    kept = {name: value.to(dtype) for name, value in values.items()}
    return {**kept, "chosen": chosen, "weights": weights}


def wanted(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    act: Any = F.silu,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    rows = []
    for token, row in enumerate(x.float()):
        total = torch.zeros(x.shape[1])
        for expert, weight in zip(chosen[token].tolist(), weights[token].tolist(), strict=True):
            both = gate_up[expert].float() @ row
            both = both if gate_up_bias is None else both + gate_up_bias[expert].float()
            gate, up = both.chunk(2)
            y = down[expert].float() @ (act(gate, up) if act is clamped else act(gate) * up)
            total += weight * (y if down_bias is None else y + down_bias[expert].float())
        rows.append(total)
    return torch.stack(rows)


def clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=0.7), up.clamp(-0.7, 0.7)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("tokens", "count", "experts"),
    [(1, 2, 8), (9, 2, 8), (40, 3, 5), (7, 4, 4), (90, 1, 3)],
    ids=["one", "few", "many", "all", "long"],
)
def test_tokens_go_through_the_experts_they_chose(
    kernel: ModuleType, tokens: int, count: int, experts: int, dtype: torch.dtype
) -> None:
    given = inputs(tokens, count, experts, dtype)
    found = kernel.experts(**given, act="silu")
    assert found.dtype is dtype
    torch.testing.assert_close(
        found.float(), wanted(**given), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * 10
    )


@pytest.mark.parametrize("tokens", [3, 30])
def test_an_expert_that_nobody_or_everybody_chose(kernel: ModuleType, tokens: int) -> None:
    given = inputs(tokens, 2, 6, torch.float32)
    given["chosen"] = torch.tensor([[5, 2]]).repeat(tokens, 1)
    torch.testing.assert_close(
        kernel.experts(**given, act="silu"), wanted(**given), rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("tokens", [3, 20])
def test_biases_and_the_clamped_gate(kernel: ModuleType, tokens: int) -> None:
    given = inputs(tokens, 2, 4, torch.float32, bias=True)
    found = kernel.experts(**given, act="clamped", limit=0.7)
    torch.testing.assert_close(found, wanted(**given, act=clamped), rtol=1e-5, atol=1e-4)


def test_other_activations(kernel: ModuleType) -> None:
    given = inputs(5, 2, 4, torch.float32)
    for name, function in (("gelu", F.gelu), ("relu", F.relu)):
        found = kernel.experts(**given, act=name)
        torch.testing.assert_close(found, wanted(**given, act=function), rtol=1e-4, atol=1e-4)


def coded(matrix: torch.Tensor, kind: str) -> Coded:
    """A matrix [out, in] as codes of a kind; those of e4m3 have scales for groups too."""
    n, k = matrix.shape
    if kind == "mxfp4":
        points = torch.tensor(E2M1)
        scale = 2.0 ** (matrix.view(n, -1, 32).abs().amax(2) / 6).log2().ceil()
        spread = matrix / scale.repeat_interleave(32, 1)
        codes = spread.unsqueeze(-1).sub(points).abs().argmin(-1).to(torch.uint8)
        return _coded.grouped(codes, scale.bfloat16(), torch.arange(k) // 32, table=points)
    if kind == "fp8 blocks":
        scale = torch.rand(n, k // 128) / 100 + 0.01
        codes = (matrix / scale.repeat_interleave(128, 1)).to(torch.float8_e4m3fn)
        return _coded.grouped(codes, scale, torch.arange(k) // 128, bits=8)
    return _round.coded(matrix, kind)


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mxfp4", "fp8 blocks", "int4", "int8", "fp8"])
def test_codes_are_multiplied_as_their_values(
    kernel: ModuleType, kind: str, dtype: torch.dtype, tokens: int
) -> None:
    """Sizes that tiles do not divide; the clamped gate and biases, as gpt-oss has them."""
    count, hidden, inner = 3, 384, 128
    up = [coded(torch.randn(2 * inner, hidden) * 0.05, kind) for _ in range(count)]
    down = [coded(torch.randn(hidden, inner) * 0.1, kind) for _ in range(count)]
    weights, chosen = torch.rand(tokens, count).topk(2)
    given = {
        "x": torch.randn(tokens, hidden).to(dtype),
        "chosen": chosen,
        "weights": weights,
        "gate_up_bias": torch.randn(count, 2 * inner).to(dtype),
        "down_bias": torch.randn(count, hidden).to(dtype),
    }
    values = [torch.stack([dequantise(m, torch.float32) for m in part]) for part in (up, down)]
    ref = wanted(gate_up=values[0], down=values[1], act=clamped, **given)
    stacks: dict[str, Any] = {"gate_up": _stack.stacked(up), "down": _stack.stacked(down)}
    found = kernel.experts(**given, **stacks, act="clamped", limit=0.7)
    assert float((found.float() - ref).norm() / ref.norm()) < (
        1e-4 if dtype.itemsize == 4 else 1e-2
    )
    mixed = kernel.experts(
        **given, **stacks | {"down": values[1].to(dtype)}, act="clamped", limit=0.7
    )
    assert float((mixed.float() - ref).norm() / ref.norm()) < (
        1e-4 if dtype.itemsize == 4 else 1e-2
    )
