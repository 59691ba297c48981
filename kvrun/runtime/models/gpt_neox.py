"""GPT-NeoX, Pythia: attention and MLP side by side, a norm each, part of each head rotated. Source:
transformers, models/gpt_neox/modeling_gpt_neox.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block, ParallelBlock
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import cut_heads, grouped
from kvrun.runtime.models import stablelm

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    theta, partial = c.number("rotary_emb_base", 10000.0), c.number("rotary_pct", 0.25)
    size = hidden // c.integer("num_attention_heads")
    rope = Rope(c.rope(theta=theta, partial=partial), size, w.dtype, w.device)
    embedding = Embedding(w, "gpt_neox.embed_in", vocab, hidden)
    blocks = [block(w, n, rope) for n in range(c.integer("num_hidden_layers"))]
    head = Head(w, "embed_out", embedding, tied=False)
    return Decoder(w, embedding, blocks, stablelm.norm(w, "gpt_neox.final_layer_norm"), head)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block | ParallelBlock:
    c, p = w.config, f"gpt_neox.layers.{n}"
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    h, bias = cut_heads(w, count, count, hidden // count), c.flag("attention_bias", True)
    qkv, out = grouped(h, hidden, f"{p}.attention.query_key_value"), f"{p}.attention.dense"
    attention = Attention(w, n, h, qkv, out, rope=rope, qkv_bias=bias, out_bias=bias)
    mlp = MLP(
        w,
        f"{p}.mlp.dense_h_to_4h",
        f"{p}.mlp.dense_4h_to_h",
        hidden=hidden,
        inner=c.integer("intermediate_size"),
        act=c.text("hidden_act", "gelu"),
    )
    first, second = (stablelm.norm(w, f"{p}.{x}_layernorm") for x in ("input", "post_attention"))
    if c.flag("use_parallel_residual", True):
        return ParallelBlock(first, attention, mlp, second)
    return Block(first, attention, second, mlp)
