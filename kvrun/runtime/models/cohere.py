"""Command-R and R+: attention and MLP side by side behind one norm without bias, rotation in pairs,
scaled logits. Source: transformers, models/cohere/modeling_cohere.py."""

from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.layers.block import ParallelBlock
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import HeadLayerNorm, LayerNorm, layer_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rope_theta=500000.0)
    return decoder(w, block)


def decoder(w: "Checkpoint", block: Any) -> Decoder:
    c = w.config
    rope = Rope(c.rope(), llama.heads(w).head_dim, w.dtype, w.device, interleaved=True)
    scale = c.number("logit_scale", 0.0625)
    return llama.decoder(w, block, norm=norm, rope=rope, tied=True, scale=scale)


def block(w: "Checkpoint", n: int, rope: Rope) -> ParallelBlock:
    qk = head_norm(w, n) if w.config.flag("use_qk_norm", False) else None
    return ParallelBlock(
        norm(w, f"model.layers.{n}.input_layernorm"),
        llama.attention(w, n, rope=rope, head_norm=qk),
        llama.mlp(w, n),
    )


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    c = w.config
    size, eps = c.integer("hidden_size"), c.number("layer_norm_eps", 1e-5)
    return layer_norm(w, name, size, eps, bias=False)


def head_norm(w: "Checkpoint", n: int) -> HeadLayerNorm:
    """Of R+: every head has a weight of its own, which is cut with the heads."""
    h, p = llama.heads(w), f"model.layers.{n}.self_attn"
    q = w.read(f"{p}.q_norm.weight", (h.heads, h.head_dim), ((h.mine,), None))
    k = w.read(f"{p}.k_norm.weight", (h.kv_heads, h.head_dim), ((h.mine_kv,), None))
    return HeadLayerNorm(torch.cat((q, k)), None, w.config.number("layer_norm_eps", 1e-5))
