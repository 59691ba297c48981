"""DBRX: norms without bias, packed projections within bounds, flat stacks of experts. Source:
transformers, models/dbrx/modeling_dbrx.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.moe import Experts, MoE, flat, softmax_top
from kvrun.runtime.layers.named import rotation
from kvrun.runtime.layers.norm import LayerNorm, layer_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import cut_heads, packed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    # Its own files say theta inside attn_config, those of transformers 5 at the top.
    rope = rotation(w, theta=c.part("attn_config").number("rope_theta", 10000.0))
    embedding = Embedding(w, "transformer.wte", c.integer("vocab_size"), c.integer("hidden_size"))
    blocks = [block(w, n, rope) for n in range(c.integer("num_hidden_layers"))]
    head = Head(w, "lm_head", embedding, tied=False)
    return Decoder(w, embedding, blocks, norm(w, "transformer.norm_f"), head)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, a, f = w.config, w.config.part("attn_config"), w.config.part("ffn_config")
    p = f"transformer.blocks.{n}"
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    h = cut_heads(w, count, a.integer("kv_n_heads", 1), hidden // count)
    qkv, out = packed(h, hidden, f"{p}.norm_attn_norm.attn.Wqkv"), "norm_attn_norm.attn.out_proj"
    power = f.optional("moe_normalize_expert_weights", 1.0) or 0.0
    route = softmax_top(f.integer("moe_top_k", 1), normalise=power)
    return Block(
        norm(w, f"{p}.norm_attn_norm.norm_1"),
        Attention(w, n, h, qkv, f"{p}.{out}", rope=rope, clip=a.number("clip_qkv", 0.0) or None),
        norm(w, f"{p}.norm_attn_norm.norm_2"),
        MoE(w, f"{p}.ffn.router.layer", route, experts(w, f"{p}.ffn.experts.mlp")),
    )


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    return layer_norm(w, name, w.config.integer("hidden_size"), 1e-5, bias=False)


def experts(w: "Checkpoint", p: str) -> Experts:
    f = w.config.part("ffn_config")
    return flat(
        w,
        p,
        ("w1", "v1", "w2"),
        count=f.integer("moe_num_experts", 4),
        hidden=w.config.integer("hidden_size"),
        inner=f.integer("ffn_hidden_size", 3584),
        act=f.part("ffn_act_fn").text("name", "silu"),
    )
