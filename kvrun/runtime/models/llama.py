"""Llama 1, 2, 3 and their relatives. Source: transformers, models/llama/modeling_llama.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.named import (
    attention,
    decoder,
    heads,
    layer,
    mlp,
    rms,
    rotated,
    rotation,
)
from kvrun.runtime.layers.position import Rope

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint

# Relatives take the parts that they share with it from here.
__all__ = [
    "USUAL", "attention", "block", "build", "decoder", "heads", "layer", "mlp", "rms", "rotated",
    "rotation",
]  # fmt: skip

# Text parts of models that see images say little more than what differs from this.
USUAL = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(**USUAL)
    return decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    bias = w.config.flag("mlp_bias", False)
    return layer(w, n, attention(w, n, rope=rope), mlp(w, n, bias=bias))
