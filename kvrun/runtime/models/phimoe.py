"""Phi 3.5 MoE: Llama with LayerNorm and experts that a sparse mixer chooses. Source: transformers,
models/phimoe/modeling_phimoe.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.moe import MoE, Route
from kvrun.runtime.layers.norm import LayerNorm, layer_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama, mixtral

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5, num_key_value_heads=8, rope_theta=1e6)
    return llama.decoder(w, block, norm=norm, bias=w.config.flag("lm_head_bias", False))


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, p = w.config, f"model.layers.{n}"
    c.refuse("num_experts_per_tok", 1)
    window = c.integer_or_none("sliding_window")
    route, name = mixer(c.number("router_jitter_noise", 0.01)), f"{p}.block_sparse_moe"
    return Block(
        norm(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, window=window),
        norm(w, f"{p}.post_attention_layernorm"),
        MoE(w, f"{name}.gate", route, mixtral.experts(w, name)),
    )


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    c = w.config
    return layer_norm(w, name, c.integer("hidden_size"), c.number("rms_norm_eps", 1e-5))


def mixer(threshold: float) -> Route:
    """The two best experts, each weighed among those that come near it (Liu et al. 2024)."""

    def best(scores: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top, chosen = scores.max(-1, keepdim=True)
        far = (top - logits) / logits.abs().clamp(min=top) > 2 * threshold
        weights = scores.masked_fill(far, float("-inf")).softmax(-1)
        return weights.gather(-1, chosen), chosen

    def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        first, one = best(logits, logits)
        second, two = best(logits.scatter(-1, one, float("-inf")), logits)
        return torch.cat((first, second), -1), torch.cat((one, two), -1)

    return route
