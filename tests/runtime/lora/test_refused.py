"""Parts of adapters that do not fit the model, or each other; what belongs to the content."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvrun.errors import BadCheckpoint, KvrunError, Unsupported
from kvrun.runtime.checkpoint import Product, Shard
from kvrun.runtime.lora.adapter import AdapterFolder
from kvrun.runtime.lora.sites import Sites
from tests.runtime.driver import Driver
from tests.runtime.lora.adapters import write
from tests.runtime.models import seq2seq

PROMISES: dict[str, tuple[Any, str]] = {
    "use_dora": (True, "lacks lora_magnitude_vector of model.layers.0.q_proj"),
    "lora_bias": (True, "lacks lora_B.bias of model.layers.0.q_proj"),
    "modules_to_save": (["score"], "lacks the saved module score"),
    "bias": ("some", "has bias = 'some'"),
}


@pytest.mark.parametrize("key", PROMISES)
def test_what_is_said_to_be_there_and_is_not(tmp_path: Path, key: str) -> None:
    value, words = PROMISES[key]
    write(tmp_path, {"model.layers.0.q_proj": (16, 8)}, **{key: value})
    with pytest.raises(KvrunError, match=words):
        AdapterFolder(tmp_path, EXTRAS)


EXTRAS = Sites(
    [
        Product((Shard("model.embed_tokens", 8, 96),), "embedding"),
        Product((Shard("model.layers.0.q_proj", 16, 8),)),
        Product((Shard("model.layers.0.kv_b_proj", 16, 8),), "by head"),
        Product((Shard("lm_head", 96, 8),), "head"),
        Product((Shard("model.layers.0.input_layernorm", 8, 1),), "gain"),
    ]
)
TOKENS = "model.embed_tokens.token_adapter.trainable_tokens_delta"
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], type[KvrunError], str]] = {
    "a vocabulary that has grown": (
        {"model.embed_tokens.weight": (98, 8)}, Unsupported, "a vocabulary of 98, the model has 96"
    ),
    "the same of the head": (
        {"lm_head.base_layer.weight": (98, 8), "lm_head.lora_A.weight": (4, 8),
         "lm_head.lora_B.weight": (98, 4)}, Unsupported, "a vocabulary of 98"
    ),
    "another hidden size": (
        {"lm_head.weight": (96, 16)}, BadCheckpoint, r"weight is \[96, 16\]; expected \[96, 8\]"
    ),
    "a head for classes": ({"score.weight": (3, 8)}, Unsupported, "changes score, which"),
    "a norm of another size": (
        {"model.layers.0.input_layernorm.weight": (9,)}, BadCheckpoint, r"gain is \[9\]"
    ),
    "a norm that is not there": ({"model.layers.0.q_norm.weight": (8,)}, Unsupported, "q_norm, wh"),
    "a vector in a matrix's place": ({"lm_head.weight": (96,)}, Unsupported, "does not take"),
    "a bias of a norm without": (
        {"model.layers.0.input_layernorm.bias": (8,)}, Unsupported, "a norm without bias does not"
    ),
    "a bias of an embedding": ({"model.embed_tokens.bias": (8,)}, Unsupported, "does not take"),
    "by head": ({"model.layers.0.kv_b_proj.weight": (16, 8)}, Unsupported, "head by head"),
    "a bias's length": (
        {"model.layers.0.q_proj.bias": (8,)}, BadCheckpoint, r"bias is \[8\]; expected \[16\]"
    ),
    "changed and replaced": (
        {"model.layers.0.q_proj.weight": (16, 8), "model.layers.0.q_proj.lora_A.weight": (4, 8),
         "model.layers.0.q_proj.lora_B.weight": (16, 4)}, BadCheckpoint, "and replaces"
    ),
    "magnitudes that are not announced": (
        {"lm_head.lora_A.weight": (4, 8), "lm_head.lora_B.weight": (96, 4),
         "lm_head.lora_magnitude_vector": (96,)}, BadCheckpoint, "says use_dora = None"
    ),
    "other tokens than announced": (
        {TOKENS: (2, 8)}, BadCheckpoint, "has 2 rows, trainable_token_indices = \\[1, 2, 97"
    ),
    "a token that is not there": ({TOKENS: (3, 8)}, Unsupported, "for token 97, the model has 96"),
    "tokens of the head": (
        {TOKENS.replace("model.embed_tokens", "lm_head"): (3, 8)}, Unsupported, "does not take"
    ),
    "tokens and a matrix": (
        {TOKENS: (3, 8), "model.embed_tokens.weight": (96, 8)}, BadCheckpoint, "and replaces"
    ),
    "magnitudes alone": (
        {"lm_head.lora_magnitude_vector": (96,)}, BadCheckpoint, "says use_dora"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_parts_that_do_not_fit(tmp_path: Path, kind: str) -> None:
    shapes, error, words = REFUSED[kind]
    write(tmp_path, {"model.layers.0.q_proj": (16, 8)}, trainable_token_indices=[1, 2, 97])
    tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(error, match=words):
        AdapterFolder(tmp_path, EXTRAS)


@pytest.mark.parametrize("between", ["modules_to_save.", "modules_to_save.default."])
def test_longer_names_of_saved_modules(tmp_path: Path, between: str) -> None:
    """What PEFT writes several times is taken once; what was there before is not taken."""
    write(tmp_path, {"model.layers.0.q_proj": (16, 8)})
    tensors = {
        f"base_model.model.lm_head.{between}weight": torch.ones(96, 8),
        "base_model.model.model.layers.0.q_proj.bias": torch.ones(16),
        f"base_model.model.model.layers.0.q_proj.{between}bias": torch.ones(16),
        "base_model.model.model.layers.0.q_proj.original_module.bias": torch.zeros(16),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    folder = AdapterFolder(tmp_path, EXTRAS)
    assert {EXTRAS.shards[site][0].name for site in folder.layout.extras} == {
        "lm_head", "model.layers.0.q_proj"
    }  # fmt: skip
    flat, _ = folder.read(torch.float32)
    assert EXTRAS.vector(flat, folder.layout.extras[1].shift, 1).tolist() == [1.0] * 16


def test_extras_are_content(tmp_path: Path) -> None:
    """Whatever differs gives another identity; what is not finite is found wherever it lies."""
    names = {
        "model.embed_tokens.weight": (96, 8), "lm_head.lora_A.weight": (4, 8),
        "lm_head.lora_B.weight": (96, 4), "model.layers.0.q_proj.bias": (16,),
    }  # fmt: skip
    tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in names.items()}
    write(tmp_path, {"model.layers.0.q_proj": (16, 8)})

    def identity(changed: str | None = None, value: float = 2.0) -> str:
        found = {n: torch.full_like(t, value) if n == changed else t for n, t in tensors.items()}
        save_file(found, tmp_path / "adapter_model.safetensors")
        return AdapterFolder(tmp_path, EXTRAS).read(torch.bfloat16)[1]

    assert len({identity(), *map(identity, tensors)}) == 5
    assert identity() == identity()
    for name in tensors:
        with pytest.raises(BadCheckpoint, match="not finite"):
            identity(name, float("nan"))


def test_an_embedding_of_several_modules_is_refused(tmp_path: Path) -> None:
    seq2seq.make(tmp_path / "base", "t5", "v1.0")
    sites = Sites(Driver(tmp_path / "base").model.products)
    for number, name in enumerate(("shared", "encoder.embed_tokens")):
        write(tmp_path / f"{number}", {name: (128, 64)})
        with pytest.raises(Unsupported, match=f"changes {name}, which"):
            AdapterFolder(tmp_path / f"{number}", sites)
    assert "lm_head" in sites.names
