"""Phi 1, 1.5 and 2: attention and a plain MLP side by side behind one LayerNorm, part of each head
rotated, biases everywhere. Source: transformers, models/phi/modeling_phi.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.block import ParallelBlock
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.norm import HeadLayerNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama, stablelm

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    rope = Rope(w.config.rope(partial=0.5), llama.heads(w).head_dim, w.dtype, w.device)
    name = "model.final_layernorm"
    return llama.decoder(w, block, norm=stablelm.norm, final_norm=name, rope=rope, bias=True)


def block(w: "Checkpoint", n: int, rope: Rope) -> ParallelBlock:
    c, p = w.config, f"model.layers.{n}"
    qk = head_norm(w, n) if c.flag("qk_layernorm", False) else None
    biases = {"qkv_bias": True, "out_bias": True}
    return ParallelBlock(
        stablelm.norm(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, head_norm=qk, out=f"{p}.self_attn.dense", **biases),
        MLP(
            w,
            f"{p}.mlp.fc1",
            f"{p}.mlp.fc2",
            hidden=c.integer("hidden_size"),
            inner=c.integer("intermediate_size"),
            act=c.text("hidden_act", "gelu_new"),
        ),
    )


def head_norm(w: "Checkpoint", n: int) -> HeadLayerNorm:
    h, p = llama.heads(w), f"model.layers.{n}.self_attn"
    parts = []
    for kind in ("weight", "bias"):
        q, k = (w.read(f"{p}.{x}_layernorm.{kind}", (h.head_dim,)) for x in "qk")
        parts.append(torch.cat((q.expand(h.count, -1), k.expand(h.kv_count, -1))))
    return HeadLayerNorm(parts[0], parts[1], w.config.number("layer_norm_eps", 1e-5))
