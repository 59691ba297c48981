"""DeepSeek V2: V3 with another choice of experts. Source: transformers,
models/deepseek_v2/modeling_deepseek_v2.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.moe import Route, in_best_groups
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.shared_moe import shared_moe
from kvrun.runtime.models import deepseek_v3, llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(n_shared_experts=2, n_routed_experts=64, first_k_dense_replace=0)
    w.config.refuse("norm_topk_prob", True)
    w.config.refuse("topk_method", "noaux_tc")
    return deepseek_v3.decoder(w, block, pairs=True)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p, dense = f"model.layers.{n}", w.config.count("first_k_dense_replace")
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        deepseek_v3.attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n) if n < dense else shared_moe(w, f"{p}.mlp", softmax_groups(w)),
    )


def softmax_groups(w: "Checkpoint") -> Route:
    c = w.config
    limited = c.text("topk_method", "greedy") == "group_limited_greedy"
    groups = c.integer("n_group") if limited else 1
    kept = c.integer("topk_group") if limited else 1
    count, factor = c.integer("num_experts_per_tok"), c.number("routed_scaling_factor", 1.0)

    def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = in_best_groups(logits.softmax(-1), groups, kept, best=1)
        weights, chosen = scores.topk(count, dim=-1)
        return weights * factor, chosen

    return route
