"""DeepSeek V3 and R1: latent attention, experts chosen by groups, one that all tokens go through.
Source: transformers, models/deepseek_v3/modeling_deepseek_v3.py."""

from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.layers.block import Block, Part
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mla import MLA
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.layers.moe import MoE, Route, listed, sigmoid_top
from kvrun.runtime.layers.position import Rope, yarn_growth
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(n_group=8, topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3)
    return decoder(w, block, pairs=w.config.flag("rope_interleave", True))


def decoder(w: "Checkpoint", block: Any, *, pairs: bool) -> Decoder:
    c = w.config
    size = c.integer("qk_rope_head_dim")
    rope = Rope(c.rope(), size, w.dtype, w.device, interleaved=pairs)
    return llama.decoder(w, block, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        mlp(w, n),
    )


def mlp(w: "Checkpoint", n: int) -> Part:
    """Dense on the first layers, then experts."""
    if n < w.config.count("first_k_dense_replace"):
        return llama.mlp(w, n)
    p = f"model.layers.{n}.mlp"
    return moe(w, p, sigmoid_groups(w, f"{p}.gate"))


def attention(w: "Checkpoint", n: int, rope: Rope) -> MLA:
    c = w.config
    size = c.integer("qk_nope_head_dim") + c.integer("qk_rope_head_dim")
    scale = size**-0.5 * yarn_growth(c.rope())
    return MLA(w, n, f"model.layers.{n}.self_attn", rope=rope, scale=scale)


def moe(w: "Checkpoint", p: str, route: Route) -> MoE:
    c = w.config
    parts = ("gate_proj", "up_proj", "down_proj")
    hidden, act = c.integer("hidden_size"), c.text("hidden_act", "silu")
    inner, count = c.integer("moe_intermediate_size"), c.integer("n_routed_experts")
    name = f"{p}.experts"
    experts = listed(w, name, parts, count=count, hidden=hidden, inner=inner, act=act)
    gate, up, down = (f"{p}.shared_experts.{part}" for part in parts)
    wide = inner * c.integer("n_shared_experts", 1)
    shared = GatedMLP(w, (gate, up), down, hidden=hidden, inner=wide, act=act)
    return MoE(w, f"{p}.gate", route, experts, wide=True, shared=shared)


def sigmoid_groups(w: "Checkpoint", p: str) -> Route:
    c = w.config
    total = c.integer("n_routed_experts")
    return sigmoid_top(
        c.integer("num_experts_per_tok"),
        w.read(f"{p}.e_score_correction_bias", (total,), dtype=torch.float32),
        groups=c.integer("n_group", 1),
        kept=c.integer("topk_group", 1),
        normalise=c.flag("norm_topk_prob", True),
        factor=c.number("routed_scaling_factor", 1.0),
    )
