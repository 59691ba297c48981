"""Mistral: Llama with a window on every layer, in its first version. Source: transformers,
models/mistral/modeling_mistral.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(**llama.USUAL | {"intermediate_size": 14336, "num_key_value_heads": 8})
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p, size = f"model.layers.{n}", w.config.optional("sliding_window", 4096)
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, window=None if size is None else int(size)),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n),
    )
