"""MiniMax M2: experts chosen by sigmoid and a bias, one norm over all queries, one over all keys,
part of each head rotated. Source: transformers, models/minimax_m2/modeling_minimax_m2.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.moe import MoE, sigmoid_top
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama, mixtral, olmo2

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    c.defaults(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-6)
    size = llama.heads(w).head_dim
    turned = c.rope(theta=5e6, partial=c.integer("rotary_dim", size) / size)
    return llama.decoder(w, block, rope=Rope(turned, size, w.dtype, w.device))


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, p = w.config, f"model.layers.{n}"
    name, count = f"{p}.block_sparse_moe", c.integer("num_local_experts")
    bias = w.read(f"{name}.e_score_correction_bias", (count,), dtype=torch.float32)
    route = sigmoid_top(c.integer("num_experts_per_tok"), bias)
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, head_norm=olmo2.whole_norm(w, n)),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        MoE(w, f"{name}.gate", route, mixtral.experts(w, name)),
    )
