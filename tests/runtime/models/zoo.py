"""Small random checkpoints of every family, with enough spread that mistakes show."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.runtime.models.variants import VARIANTS

SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


# Falcon's eager attention adds the bias of a distance twice.
_ATTENTION = {"falcon": "sdpa"}


def variants() -> Iterator[tuple[str, str]]:
    for family, named in VARIANTS.items():
        for variant in named:
            yield family, variant


def make(folder: Path, family: str, variant: str, **changes: Any) -> Any:
    """Write a random checkpoint to `folder`; the same model in transformers, in fp32."""
    torch.manual_seed(len(family) * 31 + len(variant))
    values = {**SMALL, **VARIANTS[family][variant], **changes}
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation=_ATTENTION.get(family, "eager")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Weights of norms stay near where they start, biases leave zero.
                parameter += torch.randn_like(parameter) * (0.3 if "bias" in name else 0.1)
            else:
                parameter.normal_(0.0, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.tie_weights()
    model.save_pretrained(folder)
    return model.eval()


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    path = folder / "model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
