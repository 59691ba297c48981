"""Mixtral: Mistral with experts. Source: transformers, models/mixtral/modeling_mixtral.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.moe import Experts, MoE, listed, softmax_top
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5, num_key_value_heads=8, rope_theta=1e6)
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p, window = f"model.layers.{n}", w.config.integer_or_none("sliding_window")
    route = softmax_top(w.config.integer("num_experts_per_tok", 2), normalise=1)
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, window=window),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        MoE(w, f"{p}.block_sparse_moe.gate", route, experts(w, f"{p}.block_sparse_moe")),
    )


def experts(w: "Checkpoint", p: str) -> Experts:
    c = w.config
    return listed(
        w,
        f"{p}.experts",
        ("w1", "w3", "w2"),
        count=c.integer("num_local_experts", 8),
        hidden=c.integer("hidden_size"),
        inner=c.integer("intermediate_size"),
        act=c.text("hidden_act", "silu"),
    )
