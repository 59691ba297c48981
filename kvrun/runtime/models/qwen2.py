"""Qwen 2 and 2.5: Llama with biases on queries, keys and values. Source: transformers,
models/qwen2/modeling_qwen2.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama, qwen3

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n),
    )


def attention(w: "Checkpoint", n: int, rope: Rope) -> Attention:
    return llama.attention(w, n, rope=rope, qkv_bias=True, window=qwen3.window(w, n))
