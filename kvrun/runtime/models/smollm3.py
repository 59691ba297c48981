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
    p, c = f"model.layers.{n}", w.config
    every = c.integer("no_rope_layer_interval", 4)
    usual = [int(i % every != 0) for i in range(1, n + 2)]
    rotated = c.indices("no_rope_layers", usual, n + 1)  # 1: with rope
    windows = c.flag("use_sliding_window", False) and c.get("layer_types") is not None
    attention = llama.attention(
        w, n, rope=rope if rotated[n] else None, window=c.window(n) if windows else None
    )
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention,
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n, bias=c.flag("mlp_bias", False)),
    )
