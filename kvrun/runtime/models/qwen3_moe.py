"""Qwen 3 with experts. Source: transformers, models/qwen3_moe/modeling_qwen3_moe.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block, Part
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.moe import MoE, listed, softmax_top
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
        qwen3.attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        moe(w, n) if is_sparse(w, n) else llama.mlp(w, n),
    )


def is_sparse(w: "Checkpoint", n: int) -> bool:
    every, dense = (
        w.config.integer("decoder_sparse_step", 1),
        w.config.indices("mlp_only_layers", []),
    )
    return n not in dense and (n + 1) % every == 0


def moe(
    w: "Checkpoint", n: int, *, inner: str = "moe_intermediate_size", shared: Part | None = None
) -> MoE:
    c, p = w.config, f"model.layers.{n}.mlp"
    normalise = 1.0 if c.flag("norm_topk_prob", False) else 0.0
    experts = listed(
        w,
        f"{p}.experts",
        ("gate_proj", "up_proj", "down_proj"),
        count=c.integer("num_experts"),
        hidden=c.integer("hidden_size"),
        inner=c.integer(inner),
        act=c.text("hidden_act", "silu"),
    )
    route = softmax_top(c.integer("num_experts_per_tok"), normalise=normalise)
    return MoE(w, f"{p}.gate", route, experts, shared=shared)
