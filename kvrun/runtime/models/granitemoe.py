"""Granite with experts. Source: transformers, models/granitemoe/modeling_granitemoe.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block, Part, Scaled, ScaledAttention
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.moe import MoE, stacked, top_softmax
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import granite, llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return granite.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope, shared: Part | None = None) -> Block:
    p, factor = f"model.layers.{n}", w.config.number("residual_multiplier", 1.0)
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        ScaledAttention(granite.attention(w, n, rope), factor),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        Scaled(moe(w, n, shared), factor),
    )


def moe(w: "Checkpoint", n: int, shared: Part | None) -> MoE:
    c, p = w.config, f"model.layers.{n}.block_sparse_moe"
    experts = stacked(
        w,
        f"{p}.input_linear.weight",
        f"{p}.output_linear.weight",
        count=c.integer("num_local_experts", 8),
        hidden=c.integer("hidden_size"),
        inner=c.integer("intermediate_size"),
        act=c.text("hidden_act", "silu"),
    )
    route = top_softmax(c.integer("num_experts_per_tok", 2))
    return MoE(w, f"{p}.router.layer", route, experts, shared=shared)
