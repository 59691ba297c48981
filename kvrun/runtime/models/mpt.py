"""MPT: norms without bias, a bias that grows with the distance, queries, keys and values within
bounds. Source: transformers, models/mpt/modeling_mpt.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.norm import LayerNorm, layer_norm
from kvrun.runtime.layers.position import alibi_slopes
from kvrun.runtime.layers.qkv import cut_heads, packed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c, a = w.config, w.config.part("attn_config")
    for name in ("qk_ln", "prefix_lm"):
        a.refuse(name, True)
    a.refuse("alibi", False)
    a.refuse("attn_type", "multiquery_attention")
    c.refuse("no_bias", False)
    if c.get("logit_scale") is not None:
        c.refuse("logit_scale", c.get("logit_scale"))
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    embedding = Embedding(w, "transformer.wte", vocab, hidden)
    most = a.number("alibi_bias_max", 8)
    slopes = alibi_slopes(c.integer("num_attention_heads"), w.device, most)
    blocks = [block(w, n, slopes) for n in range(c.integer("num_hidden_layers"))]
    head = Head(w, "lm_head", embedding, tied=True)
    return Decoder(w, embedding, blocks, norm(w, "transformer.norm_f"), head)


def block(w: "Checkpoint", n: int, slopes: torch.Tensor) -> Block:
    c, a, p = w.config, w.config.part("attn_config"), f"transformer.blocks.{n}"
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    h = cut_heads(w, count, count, hidden // count)
    qkv, out = packed(h, hidden, f"{p}.attn.Wqkv"), f"{p}.attn.out_proj"
    clip = a.number("clip_qkv", 0.0) or None
    scale = a.number("softmax_scale", h.head_dim**-0.5)
    inner = c.integer("expansion_ratio", 4) * hidden
    up, down = f"{p}.ffn.up_proj", f"{p}.ffn.down_proj"
    return Block(
        norm(w, f"{p}.norm_1"),
        Attention(w, n, h, qkv, out, clip=clip, scale=scale, alibi=slopes),
        norm(w, f"{p}.norm_2"),
        MLP(w, up, down, hidden=hidden, inner=inner, act="gelu", bias=False),
    )


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    size, eps = w.config.integer("hidden_size"), w.config.number("layer_norm_epsilon", 1e-5)
    return layer_norm(w, name, size, eps, bias=False)
