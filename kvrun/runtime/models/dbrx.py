"""DBRX: norms without bias, packed projections within bounds, flat stacks of experts. Source:
transformers, models/dbrx/modeling_dbrx.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.moe import Experts, MoE, made, softmax_top
from kvrun.runtime.layers.norm import LayerNorm, layer_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import cut_heads, packed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    # Its own files say theta inside attn_config, those of transformers 5 at the top.
    turned = c.rope(theta=c.part("attn_config").number("rope_theta", 10000.0))
    rope = Rope(turned, hidden // c.integer("num_attention_heads"), w.dtype, w.device)
    embedding = Embedding(w, "transformer.wte", vocab, hidden)
    blocks = [block(w, n, rope) for n in range(c.integer("num_hidden_layers"))]
    head = Head(w, "lm_head", embedding, tied=False)
    return Decoder(w, embedding, blocks, norm(w, "transformer.norm_f"), head)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, a, f = w.config, w.config.part("attn_config"), w.config.part("ffn_config")
    p = f"transformer.blocks.{n}"
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    h = cut_heads(w, count, a.integer("kv_n_heads", 1), hidden // count)
    qkv, out = packed(h, hidden, f"{p}.norm_attn_norm.attn.Wqkv"), "norm_attn_norm.attn.out_proj"
    clip = a.number("clip_qkv", 0.0) or None
    power = f.optional("moe_normalize_expert_weights", 1.0) or 0.0
    route = softmax_top(f.integer("moe_top_k", 1), normalise=power)
    return Block(
        norm(w, f"{p}.norm_attn_norm.norm_1"),
        Attention(w, n, h, qkv, f"{p}.{out}", rope=rope, clip=clip),
        norm(w, f"{p}.norm_attn_norm.norm_2"),
        MoE(w, f"{p}.ffn.router.layer", route, experts(w, f"{p}.ffn.experts.mlp")),
    )


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    return layer_norm(w, name, w.config.integer("hidden_size"), 1e-5, bias=False)


def experts(w: "Checkpoint", p: str) -> Experts:
    """Three tensors [experts * inner, hidden]; the last is used as it lies, not transposed."""
    f, hidden = w.config.part("ffn_config"), w.config.integer("hidden_size")
    count, inner = f.integer("moe_num_experts", 4), f.integer("ffn_hidden_size", 3584)
    first, last = w.group.cut(inner, p)

    def read(part: str, e: int) -> torch.Tensor:
        rows = ((e * inner + first, e * inner + last),)
        return w.read(f"{p}.{part}", (count * inner, hidden), (rows, None))

    own = last - first
    sizes = (count, 2 * own, hidden), (count, hidden, own)
    gate_up = made(w, f"{p}.w1", sizes[0], lambda e: torch.cat((read("w1", e), read("v1", e))))
    down = made(w, f"{p}.w2", sizes[1], lambda e: read("w2", e).t())
    return Experts(gate_up, down, f.part("ffn_act_fn").text("name", "silu"), count, hidden)
