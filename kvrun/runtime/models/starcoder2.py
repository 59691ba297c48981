"""StarCoder 2: LayerNorm, a plain MLP, a window on every layer. Source: transformers,
models/starcoder2/modeling_starcoder2.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.norm import LayerNorm, layer_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(num_key_value_heads=2)
    return llama.decoder(w, block, norm=norm, tied=True)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, p = w.config, f"model.layers.{n}"
    bias, window = c.flag("use_bias", True), c.integer_or_none("sliding_window")
    return Block(
        norm(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, qkv_bias=bias, out_bias=bias, window=window),
        norm(w, f"{p}.post_attention_layernorm"),
        MLP(
            w,
            f"{p}.mlp.c_fc",
            f"{p}.mlp.c_proj",
            hidden=c.integer("hidden_size"),
            inner=c.integer("intermediate_size"),
            act=c.text("hidden_act", "gelu_pytorch_tanh"),
            bias=bias,
        ),
    )


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    c = w.config
    return layer_norm(w, name, c.integer("hidden_size"), c.number("norm_epsilon", 1e-5))
