"""Helium: Llama with rotation in pairs. Source: transformers, models/helium/modeling_helium.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    c.defaults(rms_norm_eps=1e-8, head_dim=128)
    rope = Rope(c.rope(), llama.heads(w).head_dim, w.dtype, w.device, interleaved=True)
    return llama.decoder(w, block, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p, c = f"model.layers.{n}", w.config
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, out_bias=False),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n, bias=c.flag("mlp_bias", False)),
    )
