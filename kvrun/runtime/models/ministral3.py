"""Ministral 3: Mistral with queries that grow with their position. Source: transformers,
models/ministral3/modeling_ministral3.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import GrowingQueries, Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5)
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, p, h = w.config, f"model.layers.{n}", llama.heads(w)
    window = c.integer_or_none("sliding_window")
    beta = c.rope().number("llama_4_scaling_beta", 0.0)
    grown = GrowingQueries(h, beta, c.rope().number("original_max_position_embeddings"))
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, window=window, head_norm=grown),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n),
    )
