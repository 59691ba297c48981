"""Shapes: config.json of well-known models, to be measured with random weights and no download."""

import difflib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvrun.errors import NotFound

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


def _shape(model_type: str, hidden: int, inner: int, layers: int, heads: int, kv_heads: int,
           head_dim: int, vocab: int, *, theta: float, tied: bool, context: int,
           eps: float) -> dict[str, Any]:  # fmt: skip
    return {
        "architectures": [_ARCHITECTURES[model_type]],  # other engines ask for it
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": "bfloat16",
    }


# The context of llama-3-8b is that of 3.1, so that a prompt of 8192 tokens leaves room for answers.
SHAPES = {
    "llama-3-8b": _shape("llama", 4096, 14336, 32, 32, 8, 128, 128256,
                         theta=5e5, tied=False, context=131072, eps=1e-5),
    "llama-3.2-1b": _shape("llama", 2048, 8192, 16, 32, 8, 64, 128256,
                           theta=5e5, tied=True, context=131072, eps=1e-5),
    "qwen3-0.6b": _shape("qwen3", 1024, 3072, 28, 16, 8, 128, 151936,
                         theta=1e6, tied=True, context=40960, eps=1e-6),
    "smollm2-135m": _shape("llama", 576, 1536, 30, 9, 3, 64, 49152,
                           theta=1e5, tied=True, context=8192, eps=1e-5),
    "gemma-2-2b": _shape("gemma2", 2304, 9216, 26, 8, 4, 256, 256000,
                         theta=1e4, tied=True, context=8192, eps=1e-6)
    | {"sliding_window": 4096},
    # A quarter of Mixtral 8x7B's layers, so that it fits beside its cache.
    "mixtral-8-layers": _shape("mixtral", 4096, 14336, 8, 32, 8, 128, 32000,
                               theta=1e6, tied=False, context=32768, eps=1e-5)
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
}  # fmt: skip


@contextmanager
def folder(name: str) -> Iterator[Path]:
    """A folder with nothing but the config.json of a shape, there while it is needed.

    Raises NotFound for a name that is no shape.
    """
    if name not in SHAPES:
        near = difflib.get_close_matches(name.lower(), SHAPES, 1)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(SHAPES)}"
        raise NotFound(f"there is no shape '{name}'.", hint=hint)
    with tempfile.TemporaryDirectory(prefix="kvrun-bench-") as place:
        (Path(place) / "config.json").write_text(json.dumps(SHAPES[name], indent=1))
        yield Path(place)
