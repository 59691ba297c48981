"""Matrices that are rounded as they are read."""

from pathlib import Path

import pytest
import torch

from kvrun import LLM, SamplingParams
from kvrun.errors import InvalidRequest, Unsupported
from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.config import QUANTIZE, QUANTIZE_ALIASES, EngineConfig
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.quant import _round
from tests.runtime.models import zoo

# Relative errors of a Gaussian matrix: what these numbers of bits can do, and a little more.
LOST = {"int8": 0.01, "fp8": 0.03, "int4": 0.1, "nf4": 0.1, "fp4": 0.13}


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got.float() - ref.float()).norm() / ref.float().norm())


@pytest.mark.parametrize("method", QUANTIZE)
@pytest.mark.parametrize("k", [256, 192, 75])
def test_values_are_near(method: str, k: int) -> None:
    weight = torch.randn(48, k, generator=torch.Generator().manual_seed(k))
    made = _round.coded(weight, method)
    values = w4a16.dequantise(made, torch.float32)
    assert off(values, weight) < LOST[method] * (1.5 if k == 75 else 1)
    assert made.nbytes < weight.nbytes


@pytest.mark.parametrize("method", QUANTIZE)
def test_zeros_and_single_values(method: str) -> None:
    weight = torch.zeros(4, 128)
    assert not w4a16.dequantise(_round.coded(weight, method), torch.float32).any()
    weight[1, 3] = 5.0
    values = w4a16.dequantise(_round.coded(weight, method), torch.float32)
    assert values[1, 3] == pytest.approx(5.0, rel=0.05)
    assert values.count_nonzero() == 1


def test_codes_are_the_nearest_and_ranges_the_best() -> None:
    """No single code can be changed for the better; a narrowed range is taken if it is."""
    weight = torch.randn(8, 64)
    made = _round.whole(weight, 4, 32, symmetric=False)
    lost = (made.values() - weight).abs()
    for change in (-1, 1):
        other = made._replace(codes=(made.codes.int() + change).clamp(0, 15).to(torch.uint8))
        assert (lost <= (other.values() - weight).abs() + 1e-6).all()
    plain = _round.whole(weight, 4, 32, symmetric=False, clip=False)
    assert lost.square().sum() < (plain.values() - weight).square().sum()


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(10, 64)
    whole = [w4a16.dequantise(_round.coded(weight, m), torch.float32) for m in QUANTIZE]
    monkeypatch.setattr(_round, "_CPU_PIECE", 3 * 64)
    parts = [w4a16.dequantise(_round.coded(weight, m), torch.float32) for m in QUANTIZE]
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("method", QUANTIZE)
def test_a_model_answers(method: str) -> None:
    with LLM("tiny", quantize=method) as llm:
        out = llm.chat(
            [{"role": "user", "content": "What is the capital of France?"}],
            SamplingParams(max_tokens=20, temperature=0),
        )
    assert "Paris" in out[0].text


def test_names() -> None:
    for alias, name in QUANTIZE_ALIASES.items():
        assert EngineConfig(model="m", quantize=alias).rounding == name
    assert EngineConfig(model="m").rounding is None
    with pytest.raises(InvalidRequest, match="int3"):
        EngineConfig(model="m", quantize="int3")


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    zoo.make(tmp_path, "llama", "v2")
    zoo.edit_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(Unsupported, match="quantized already, as 'gptq'"):
        LLM(str(tmp_path), quantize="int8")


@pytest.mark.parametrize(
    "name", ["gate", "mlp.router", "block_sparse_moe.router.layer", "mlp.shared_expert_gate"]
)
def test_routers_stay_as_they_are(name: str) -> None:
    """One wrong choice of an expert costs more than a router's bytes."""
    assert _round.stays(Shard(f"model.layers.3.{name}", 8, 64))
    assert not _round.stays(Shard("model.layers.3.mlp.experts.0.gate_proj", 8, 64))
