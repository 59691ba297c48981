"""Experts that a router chooses, beside one that all tokens go through (DeepSeek and relatives)."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.mlp import gated_mlp
from kvrun.runtime.layers.moe import MoE, Route, listed, sigmoid_top

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def shared_moe(w: "Checkpoint", p: str, route: Route) -> MoE:
    """The experts under `p` as DeepSeek names them, and the one beside them."""
    c = w.config
    parts = ("gate_proj", "up_proj", "down_proj")
    hidden, act = c.integer("hidden_size"), c.text("hidden_act", "silu")
    inner, count = c.integer("moe_intermediate_size"), c.integer("n_routed_experts")
    name = f"{p}.experts"
    experts = listed(w, name, parts, count=count, hidden=hidden, inner=inner, act=act)
    shared = gated_mlp(w, f"{p}.shared_experts", inner * c.integer("n_shared_experts", 1))
    return MoE(w, f"{p}.gate", route, experts, wide=True, shared=shared)


def sigmoid_groups(w: "Checkpoint", p: str) -> Route:
    """By sigmoid within the best groups, with the correction that lies beside the router `p`."""
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
