"""StableLM: LayerNorm, part of each head rotated, in some sizes norms of every head or attention
and MLP side by side. Source: transformers, models/stablelm/modeling_stablelm.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.block import Block, ParallelBlock
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import HeadLayerNorm, LayerNorm, layer_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    rope = Rope(w.config.rope(partial=0.25), llama.heads(w).head_dim, w.dtype, w.device)
    return llama.decoder(w, block, norm=norm, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block | ParallelBlock:
    c, p = w.config, f"model.layers.{n}"
    qk = head_norm(w, n) if c.flag("qk_layernorm", False) else None
    bias = c.flag("use_qkv_bias", False)
    first = norm(w, f"{p}.input_layernorm")
    attention = llama.attention(w, n, rope=rope, head_norm=qk, qkv_bias=bias)
    if c.flag("use_parallel_residual", False):
        return ParallelBlock(first, attention, llama.mlp(w, n))
    return Block(first, attention, norm(w, f"{p}.post_attention_layernorm"), llama.mlp(w, n))


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    c = w.config
    return layer_norm(w, name, c.integer("hidden_size"), c.number("layer_norm_eps", 1e-5))


def head_norm(w: "Checkpoint", n: int) -> HeadLayerNorm:
    h, p = llama.heads(w), f"model.layers.{n}.self_attn"
    # Every rank reads all of them: they are small, and none is left over.
    q = [f"{p}.q_layernorm.norms.{i}.weight" for i in range(h.heads)]
    k = [f"{p}.k_layernorm.norms.{i}.weight" for i in range(h.kv_heads)]
    weights = [w.read(name, (h.head_dim,)) for name in q + k]
    mine = weights[: h.heads][slice(*h.mine)] + weights[h.heads :][slice(*h.mine_kv)]
    return HeadLayerNorm(torch.stack(mine), None, w.config.number("layer_norm_eps", 1e-5))
