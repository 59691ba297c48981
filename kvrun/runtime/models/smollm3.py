"""SmolLM 3: Llama without positions on every fourth layer. Source: transformers,
models/smollm3/modeling_smollm3.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(num_key_value_heads=4, rope_theta=2e6)
    return llama.decoder(w, block, tied=True)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, turned = w.config, rope if llama.rotated(w, n) else None
    windows = c.flag("use_sliding_window", False) and c.get("layer_types") is not None
    attention = llama.attention(w, n, rope=turned, window=c.window(n) if windows else None)
    return llama.layer(w, n, attention, llama.mlp(w, n, bias=c.flag("mlp_bias", False)))
