"""ERNIE 4.5, dense: Llama with rotation in pairs. Source: transformers,
models/ernie4_5/modeling_ernie4_5.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    c.defaults(rms_norm_eps=1e-5, num_key_value_heads=2, head_dim=128)
    rope = Rope(
        c.rope(theta=500000.0), llama.heads(w).head_dim, w.dtype, w.device, interleaved=True
    )
    return llama.decoder(w, block, rope=rope, tied=True)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p, bias = f"model.layers.{n}", w.config.flag("use_bias", False)
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, qkv_bias=bias, out_bias=bias),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n, bias=bias),
    )
