"""Plan: sizes from what is free, and refusals that say what would fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvrun.errors import InvalidRequest, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.plan import Plan, examine, make_plan, size


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "weight_bytes": 14_000_000,
        "kv_bytes_per_block": 16_000,  # 16 tokens of 1 kB
        "free_bytes": 1_000_000_000,
        "on_cpu": True,
        "kv_memory": None,
        "block_size": 16,
        "max_num_seqs": 4,
        "max_position": 2048,
        "max_model_len": None,
    }
    return make_plan(**{**values, **changes})


def test_no_more_than_can_be_used() -> None:
    assert plan().kv_tokens == 4 * 2048
    assert plan().max_model_len == 2048
    assert plan().line() == "weights 14.0 MB, KV 8.2 MB = 8,192 tokens, context 2,048"


def test_an_unset_context_shrinks_to_what_fits() -> None:
    small = plan(kv_memory=1_000_000)
    assert small.kv_tokens == 61 * 16  # 62 blocks of 16 kB, one of them padding
    assert small.max_model_len == 61 * 16


def test_a_context_asked_for_is_kept_or_refused() -> None:
    assert plan(max_model_len=1024).max_model_len == 1024
    with pytest.raises(Unsupported, match="made for 2,048"):
        plan(max_model_len=2049)
    with pytest.raises(Unsupported, match="2,048 tokens needs") as caught:
        plan(kv_memory=1_000_000, max_model_len=2048)
    assert caught.value.hint == "max_model_len=976 fits"


def test_fractions_and_bytes() -> None:
    assert plan(kv_memory=0.001).kv_tokens == 61 * 16
    with pytest.raises(Unsupported, match="2.0 GB, but 1.0 GB are free"):
        plan(kv_memory=2_000_000_000)
    with pytest.raises(Unsupported, match="free some memory"):
        plan(free_bytes=10_000)
    with pytest.raises(Unsupported, match="ask for more kv_memory"):
        plan(kv_memory=10_000)


def test_sizes_for_people() -> None:
    assert [size(n) for n in (999, 1500, 14_680_000, 528_000_000, 2_140_000_000)] == [
        "999 B", "1.5 kB", "14.7 MB", "528 MB", "2.1 GB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int3"},
        {"device": "tpu"},
        {"block_size": 0},
        {"kv_memory": -1},
        {"threads": 0},
        {"kv_memory": float("nan")},
        {"step_timeout": 0},
        {"run_ahead": -1},
    ],
)
def test_configurations_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        EngineConfig(model="x", **wrong)


def model(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    values = {
        "model_type": "llama", "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "hidden_size": 32, "max_position_embeddings": 128,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_facts_come_from_headers(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(10, 10, dtype=torch.bfloat16), "b": torch.zeros(20)}
    facts = examine(model(tmp_path, tensors, dtype="bfloat16"))
    assert (facts.model_type, facts.dtype, facts.context, facts.layers) == (
        "llama", "bfloat16", 128, 3
    )  # fmt: skip
    assert facts.parameters == 120
    assert facts.stored_bytes == 200 + 80
    assert facts.stored == ("BF16", "F32")
    assert facts.kv_values == 2 * 3 * 2 * 8  # keys and values, layers, heads, values of a head
    assert examine(model(tmp_path, tensors, head_dim=16)).kv_values == 2 * 3 * 2 * 16


def test_facts_of_a_quantized_model_and_of_an_unknown_one(tmp_path: Path) -> None:
    tensors = {"q": torch.zeros(8, dtype=torch.int32)}
    facts = examine(model(tmp_path, tensors, quantization_config={"quant_method": "gptq"}))
    assert facts.parameters is None
    assert facts.quant_method == "gptq"
    assert facts.fit(free_bytes=10**6, on_cpu=False, itemsize=2).weight_bytes == 32
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    facts = examine(tmp_path)
    assert (facts.layers, facts.context, facts.kv_values) == (None, None, None)


def test_whether_a_model_fits(tmp_path: Path) -> None:
    facts = examine(model(tmp_path, {"a": torch.zeros(1000)}))
    token = facts.kv_values * 4  # type: ignore[operator]
    plan = facts.fit(free_bytes=4000 + 129 * 16 * token, on_cpu=False, itemsize=4)
    assert (plan.weight_bytes, plan.max_model_len) == (4000, 128)
    tight = facts.fit(free_bytes=4000 + 3 * 16 * token, on_cpu=False, itemsize=4)
    assert tight.max_model_len == 32  # two blocks of 16, and the padding
    with pytest.raises(Unsupported, match="weights need 4.0 kB, 3.9 kB are free"):
        facts.fit(free_bytes=3900, on_cpu=False, itemsize=4)
    with pytest.raises(Unsupported, match="context"):
        facts.fit(free_bytes=4000 + token, on_cpu=False, itemsize=4)
