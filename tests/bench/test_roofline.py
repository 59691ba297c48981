"""Bounds from a config.json alone, beside those worked out by hand for an 8B model on an H200."""

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kvrun.bench import shapes, workloads
from kvrun.bench.datasheet import promised
from kvrun.bench.roofline import Ceilings, Cost
from kvrun.errors import NotFound, Unsupported
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.plan import examine
from kvrun.runtime.tensorfile import TensorFolder
from tests.runtime.models import zoo

H200 = Ceilings(4.3e12, 790e12)


def cost(name: str, dtype: str = "bfloat16", kv_dtype: str | None = None) -> Cost:
    with shapes.folder(name) as folder:
        return Cost.of(HFConfig.read(folder), dtype, kv_dtype)


def test_what_an_8b_model_holds() -> None:
    found = cost("llama-3-8b")
    assert found.linear == pytest.approx(6.979e9, rel=1e-4)
    assert found.head == pytest.approx(0.525e9, rel=1e-3)
    assert found.weight_bytes == pytest.approx(15.01e9, rel=1e-4)
    assert found.kv_bytes_per_token == 131_072
    assert cost("llama-3-8b", "float32").weight_bytes == 2 * found.weight_bytes
    assert cost("llama-3-8b", "bfloat16", "float8_e4m3fn").kv_bytes_per_token == 65_536


def test_layers_and_head_of_other_widths() -> None:
    found = replace(cost("llama-3-8b"), linear_width=0.5, head_width=1.0)
    assert found.weight_bytes == pytest.approx(0.5 * 6.979e9 + 0.525e9, rel=1e-3)
    assert found.step(1, 1).weight_bytes == found.weight_bytes


@pytest.mark.parametrize(
    ("batch", "context", "milliseconds"),
    [
        (1, 1, 3.49), (1, 1024, 3.52), (1, 4096, 3.62), (1, 8192, 3.74),
        (8, 128, 3.52), (8, 1024, 3.74), (8, 4096, 4.49), (8, 8192, 5.49),
        (64, 128, 3.74), (64, 1024, 5.49), (64, 4096, 11.5), (64, 8192, 19.5),
        (128, 1024, 7.49), (128, 8192, 35.5),
        (256, 128, 5.86), (256, 1024, 12.9), (256, 4096, 36.8), (256, 8192, 68.8),
        (1, 576, 3.51), (32, 576, 4.05), (256, 576, 9.36),
    ],
)  # fmt: skip
def test_a_decode_step(batch: int, context: int, milliseconds: float) -> None:
    seconds = cost("llama-3-8b").step(batch, context).seconds(H200)
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=5e-3)


def test_the_datasheet_instead_of_what_was_measured() -> None:
    at = promised("NVIDIA H200", "bfloat16")
    assert at is not None
    assert 1e3 * cost("llama-3-8b").step(256, 1024).seconds(at) == pytest.approx(11.0, rel=5e-3)
    assert promised("NVIDIA H200", "float32") is None
    assert promised("a CPU", "bfloat16") is None


@pytest.mark.parametrize(
    ("tokens", "rate"), [(1024, 55_500), (4096, 52_600), (8192, 49_000), (32768, 35_000)]
)
def test_prompts(tokens: int, rate: float) -> None:
    work = cost("llama-3-8b").prefill(1, tokens)
    assert tokens / work.seconds(H200) == pytest.approx(rate, rel=5e-3)
    behind = cost("llama-3-8b").prefill(1, tokens, depth=tokens)
    assert behind.attention_flops == 3 * work.attention_flops


@pytest.mark.parametrize(
    ("shape", "name", "rate"),
    [("llama-3-8b", "mixed256", 13_300), ("qwen3-0.6b", "mixed256", 36_200)],
)
def test_many_requests_at_once(shape: str, name: str, rate: float) -> None:
    work = workloads.mixed(name)
    lengths = [(len(prompt), n) for prompt, n in work.requests()]
    seconds = cost(shape).offline(lengths, H200, slots=256, kv_tokens=800_000)
    assert work.total_output / seconds == pytest.approx(rate, rel=5e-3)


def test_fewer_places_and_a_smaller_cache_take_longer() -> None:
    found, lengths = cost("llama-3-8b"), [(100, 50)] * 20
    times = [
        found.offline(lengths, H200, slots=slots, kv_tokens=room)
        for slots, room in ((20, None), (4, None), (20, 450), (1, None))
    ]
    assert times == sorted(times)
    one_by_one = 20 * found.offline(lengths[:1], H200, slots=1)
    assert times[-1] == pytest.approx(one_by_one, rel=0.1)


def test_the_first_token_waits_for_the_weights_at_least() -> None:
    found = cost("llama-3-8b")
    assert found.offline([(8, 1)], H200, slots=1) == found.weight_bytes / H200.bandwidth


def test_layers_with_a_window_read_no_more_than_it() -> None:
    values = dict(shapes.SHAPES["qwen3-0.6b"], num_hidden_layers=4)
    sliding = {"sliding_window": 100, "model_type": "gemma2"}
    full, mixed = Cost.of(HFConfig(values)), Cost.of(HFConfig(values | sliding))
    assert mixed.windows == (100, 0, 100, 0)
    assert mixed.step(1, 50).kv_bytes == full.step(1, 50).kv_bytes
    assert mixed.step(1, 300).kv_bytes == full.step(1, 200).kv_bytes
    # Qwen's configurations name a window that they do not use.
    assert Cost.of(HFConfig(values | {"sliding_window": 100})).windows == (0,) * 4


UNCOUNTED = ("deepseek_v2", "deepseek_v3", "llama4_text", "mamba", "mamba2", "granitemoehybrid")
COUNTED = [v for v in zoo.variants() if v[0] not in UNCOUNTED and v[1] != "350m"]


@pytest.mark.parametrize(("family", "variant"), COUNTED)
def test_parameters_are_those_of_transformers(family: str, variant: str) -> None:
    config = AutoConfig.for_model(family, **{**zoo.SMALL, **zoo.VARIANTS[family][variant]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    tables = {id(head), id(model.get_input_embeddings().weight)}
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in tables and p.ndim > 1 and not name.endswith(("bias", "_norm.weight"))
    }
    layers = {n: p for n, p in matrices.items() if ".wpe" not in n and "positions" not in n}
    experts = sum(p.numel() for n, p in layers.items() if ".experts." in n)
    found = Cost.of(HFConfig(json.loads(config.to_json_string(use_diff=False))))
    gates = 64 * sum("shared_expert_gate" in name for name in layers)  # one row each: not counted
    assert found.experts == experts
    assert found.linear == sum(p.numel() for p in layers.values()) - experts - gates
    assert found.head == head.numel()


@pytest.mark.parametrize(
    ("family", "variant", "tied"),
    [
        ("llama", "v3", False), ("llama", "v3.1", True), ("qwen2", "plain", False),
        ("gemma2", "plain", True), ("mixtral", "plain", False), ("gpt_neox", "pythia", False),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_checkpoint(
    tmp_path: Path, family: str, variant: str, tied: bool
) -> None:
    """An embedding beside the output is one more matrix, one that is the output too is none."""
    zoo.make(tmp_path, family, variant)
    stored = TensorFolder(tmp_path)
    shapes = [stored.find(name)[1].shape for name in stored.names]
    stored.close()
    found = Cost.of(HFConfig.read(tmp_path))
    assert found.parameters == sum(prod(shape) for shape in shapes if len(shape) > 1)
    assert (found.embedding == 0) is tied
    parameters = examine(tmp_path).parameters
    assert parameters is not None
    assert found.parameters == pytest.approx(parameters, rel=0.03)  # norms and biases


def test_experts_are_read_as_far_as_they_are_chosen() -> None:
    found = cost("mixtral-8-layers")
    assert found.share == 0.25
    dense = (found.linear + found.head) * found.width
    assert found.weights_read(1) == dense + 0.25 * found.experts * found.width
    assert found.weights_read(1) < found.weights_read(2) < found.weights_read(64)
    assert found.weights_read(64) == pytest.approx(found.weight_bytes, rel=1e-3)
    assert found.step(1, 10).product_flops == 2 * (found.linear + found.head + found.experts / 4)


def test_what_has_no_known_limit() -> None:
    with pytest.raises(Unsupported, match="latent attention"):
        Cost.of(HFConfig({"model_type": "deepseek_v3", "kv_lora_rank": 512}))
    with pytest.raises(Unsupported, match="chunks of attention"):
        Cost.of(HFConfig({"model_type": "llama4_text", "attention_chunk_size": 8192}))
    for said in ({"model_type": "mamba2", "state_size": 128}, {"ssm_cfg": {}}):
        with pytest.raises(Unsupported, match="recurrent layers"):
            Cost.of(HFConfig(said))


def test_a_shape_that_is_none() -> None:
    with pytest.raises(NotFound, match="did you mean 'llama-3-8b'"), shapes.folder("llama3-8b"):
        pass
