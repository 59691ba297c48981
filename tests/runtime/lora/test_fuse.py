"""fuse: a model whose weights hold an adapter says what the adapter beside the model says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kvrun.errors import InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.lora import fuse as module
from kvrun.runtime.lora.fuse import fuse
from tests.runtime.driver import Driver
from tests.runtime.lora.adapters import ALL, edit, peft_model, save, write
from tests.runtime.models import zoo

IDS = list(range(3, 20))
TABLES = ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("variant", ["v3", "v3.1"])
def test_fused_weights_say_what_peft_says(tmp_path: Path, variant: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    patterns = {"k_proj": 2}
    peft = peft_model(
        zoo.make(base, "llama", variant), 1, r=8, use_rslora=True, rank_pattern=patterns
    )
    peft.save_pretrained(adapter, save_embedding_layers=False)
    with torch.no_grad():
        expected = peft(torch.tensor([IDS])).logits[0]
    seen: list[int] = []
    assert fuse(base, adapter, tmp_path / "out", lambda done, all: seen.append(done)) == 14
    assert seen == list(range(1, len(seen) + 1))
    (found,) = Driver(tmp_path / "out").step([(0, IDS)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == set(ALL)
    assert all(before[name].dtype is after[name].dtype for name in before)


UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
LLAMA4 = ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"]
NONE: dict[str, Any] = {"target_modules": []}
TURNED = {"fan_in_fan_out": True, "target_modules": ["c_attn"]}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dora": ("llama", "biases", {"use_dora": True, "target_modules": ["o_proj", *TABLES]}),
    "tables": ("llama", "biases", {"target_modules": ["up_proj", *TABLES]}),
    "saved": ("llama", "biases", {"modules_to_save": ["k_proj", *TABLES]}),
    "lora_bias": ("llama", "biases", {"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}),
    "biases": ("llama", "biases", {"bias": "all", "target_modules": ["q_proj", "down_proj"]}),
    "norms": ("gemma2", "plain", {"modules_to_save": ["input_layernorm", "norm"],
                                  "target_modules": ["q_proj"]}),
    "biases of norms": ("gpt2", "plain", {**TURNED, "bias": "all"}),
    "tokens": ("llama", "v3", {"trainable_token_indices": [3, 9], "target_modules": ["q_proj"]}),
    "tied tokens": ("llama", "v3.1", {"trainable_token_indices": [4, 5, 19],
                                      "target_modules": ["k_proj"]}),
    "tied embedding": ("llama", "v3.1", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "tied head": ("llama", "v3.1", {"target_modules": ["lm_head", "k_proj"]}),
    "tied tables": ("llama", "v3.1", {"modules_to_save": TABLES, "target_modules": ["q_proj"]}),
    "tied and scaled": ("gemma2", "plain", {"target_modules": TABLES}),
    "experts in files": ("mixtral", "plain", {"target_parameters": [UP, DOWN], **NONE}),
    "experts in a stack": ("gpt_oss", "plain", {"target_parameters": [UP, DOWN], **NONE}),
    "experts turned": ("llama4_text", "scout", {"target_parameters": LLAMA4, **NONE}),
    "turned dora": ("gpt2", "plain", {**TURNED, "use_dora": True}),
    "turned matrices": ("gpt2", "plain", {**TURNED, "modules_to_save": ["c_fc"]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_fused(tmp_path: Path, kind: str) -> None:
    family, variant, config = KINDS[kind]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    peft = peft_model(zoo.make(base, family, variant), 1, **config)
    save(peft, adapter)
    with torch.no_grad():
        expected = peft(torch.tensor([IDS])).logits[0]
    fuse(base, adapter, tmp_path / "out")
    (found,) = Driver(tmp_path / "out").step([(0, IDS)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    (before,) = Driver(base).step([(0, IDS)])
    assert (found - before).abs().max() > 0.05


def test_an_index_knows_of_a_head_that_is_new(tmp_path: Path) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    model = zoo.make(base, "llama", "v3.1")
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    peft = peft_model(model, 1, target_modules=["lm_head"])
    save(peft, adapter)
    with torch.no_grad():
        expected = peft(torch.tensor([IDS])).logits[0]
    fuse(base, adapter, out)
    (found,) = Driver(out).step([(0, IDS)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(out)(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(again, expected, atol=1e-4, rtol=1e-4)


def test_a_bias_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    options: dict[str, Any] = {"lora_bias": True, "target_modules": ["q_proj"]}
    save(peft_model(zoo.make(base, "llama", "v3"), 1, **options), adapter)
    with pytest.raises(Unsupported, match=r"q_proj.bias, for which the model has no place"):
        fuse(base, adapter, tmp_path / "out")


def test_transposed_weights(tmp_path: Path) -> None:
    """GPT-2 keeps its matrices as [in, out]; A and B know nothing of it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"h.0.attn.c_attn.weight": torch.zeros(8, 24)}, base / "model.safetensors")
    deltas = write(adapter, {"transformer.h.0.attn.c_attn": (24, 8)}, fan_in_fan_out=True)
    fuse(base, adapter, tmp_path / "out")
    (found,) = load_file(tmp_path / "out" / "model.safetensors").values()
    torch.testing.assert_close(found, deltas["transformer.h.0.attn.c_attn"].t())


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    zoo.make(base, "llama", "v3")
    write(adapter, {"model.layers.0.self_attn.q_proj": (64, 64)})
    with pytest.raises(InvalidRequest, match="exists"):
        fuse(base, adapter, base)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(KvrunError, match="cannot be written"):
            fuse(base, adapter, out)
    edit(adapter, layer_replication=[[0, 1]])
    with pytest.raises(Unsupported) as caught:
        fuse(base, adapter, out)
    assert "layer_replication" in str(caught.value)
    edit(adapter, layer_replication=None)
    zoo.edit_config(base, quantization_config={"quant_method": "gptq"})
    with pytest.raises(Unsupported, match="quantized"):
        fuse(base, adapter, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
