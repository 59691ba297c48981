"""DeepSeek V3 and R1: latent attention, experts chosen by groups, one that all tokens go through.
Source: transformers, models/deepseek_v3/modeling_deepseek_v3.py."""

from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mla import MLA
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.layers.moe import MoE, Route, in_best_groups, listed
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
    c, p = w.config, f"model.layers.{n}"
    count = c.get("first_k_dense_replace")
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n) if n < count else moe(w, f"{p}.mlp", sigmoid_groups(w, f"{p}.mlp.gate")),
    )


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
    """A bias takes part in the choice of groups and experts, not in their weights."""
    c = w.config
    total, count = c.integer("n_routed_experts"), c.integer("num_experts_per_tok")
    groups, kept = c.integer("n_group", 1), c.integer("topk_group", 1)
    normalise, factor = c.flag("norm_topk_prob", True), c.number("routed_scaling_factor", 1.0)
    bias = w.read(f"{p}.e_score_correction_bias", (total,), dtype=torch.float32)

    def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid()
        ranked = in_best_groups(scores + bias, groups, kept, best=2)
        chosen = ranked.topk(count, dim=-1)[1]
        weights = scores.gather(1, chosen)
        if normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * factor, chosen

    return route
