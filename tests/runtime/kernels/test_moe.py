"""Experts: both forms against each token's own MLPs."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import moe as twin
from kvrun.runtime.kernels.triton import moe as triton

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
