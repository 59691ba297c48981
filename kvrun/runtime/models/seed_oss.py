"""Seed-OSS: Llama with biases on queries, keys and values. Source: transformers,
models/seed_oss/modeling_seed_oss.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(num_key_value_heads=8, head_dim=128)
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, p = w.config, f"model.layers.{n}"
    q, out = c.flag("attention_bias", True), c.flag("attention_out_bias", False)
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, qkv_bias=q, out_bias=out),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n, bias=c.flag("mlp_bias", False)),
    )
