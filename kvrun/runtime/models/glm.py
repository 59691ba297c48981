"""GLM: half of each head rotated in pairs, gate and up packed. Source: transformers,
models/glm/modeling_glm.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama, phi3

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1.5625e-7, num_key_value_heads=2, head_dim=128)
    return llama.decoder(w, block, rope=rope(w))


def rope(w: "Checkpoint") -> Rope:
    parameters = w.config.rope(partial=0.5)
    return Rope(parameters, llama.heads(w).head_dim, w.dtype, w.device, interleaved=True)


def attention(w: "Checkpoint", n: int, rope: Rope) -> Attention:
    bias = w.config.flag("attention_bias", True)
    return llama.attention(w, n, rope=rope, qkv_bias=bias, out_bias=False)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        phi3.mlp(w, n),
    )
