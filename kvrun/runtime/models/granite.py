"""Granite: Llama with four multipliers. Source: transformers,
models/granite/modeling_granite.py."""

from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block, Scaled, ScaledAttention
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return decoder(w, block)


def decoder(w: "Checkpoint", block: Any) -> Decoder:
    c = w.config
    scale, divisor = c.number("embedding_multiplier", 1.0), c.number("logits_scaling", 1.0)
    return llama.decoder(w, block, embedding_scale=scale, scale=1.0 / divisor)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p, c = f"model.layers.{n}", w.config
    factor = c.number("residual_multiplier", 1.0)
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        ScaledAttention(attention(w, n, rope), factor),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        Scaled(llama.mlp(w, n, bias=c.flag("mlp_bias", False)), factor),
    )


def attention(w: "Checkpoint", n: int, rope: Rope | None) -> Attention:
    return llama.attention(w, n, rope=rope, scale=w.config.number("attention_multiplier", 1.0))
