"""Small random checkpoints of every family, with enough spread that mistakes show."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

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
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
# family -> variant -> what its config says differently
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "v2": {"num_key_value_heads": 4},
        "v3": {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "v3.1": {
            "head_dim": 32,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_theta": 500000.0, **_LLAMA3},
        },
        "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1},
        "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        "yarn": {"rope_parameters": {"rope_theta": 1e4, **_YARN}},
    },
    "qwen3": {
        "plain": {"head_dim": 32},
        "tied": {"head_dim": 16, "tie_word_embeddings": True, "num_key_value_heads": 1},
        "window": {
            "head_dim": 16,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            **_WINDOWED,
        },
    },
    "gemma2": {
        # Low caps, so that they bend the small scores and logits of so small a model.
        "plain": {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 6,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0,
        },
        "uncapped": {
            "head_dim": 32,
            "num_key_value_heads": 1,
            "sliding_window": 7,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    },
}


def variants() -> Iterator[tuple[str, str]]:
    for family, named in VARIANTS.items():
        for variant in named:
            yield family, variant


def make(folder: Path, family: str, variant: str, **changes: Any) -> Any:
    """Write a random checkpoint to `folder`; the same model in transformers, in fp32."""
    torch.manual_seed(len(family) * 31 + len(variant))
    values = {**SMALL, **VARIANTS[family][variant], **changes}
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                # Weights of norms stay near where they start, biases leave zero.
                parameter += torch.randn_like(parameter) * (0.3 if "bias" in name else 0.1)
            else:
                parameter.normal_(0.0, 0.2)
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
