"""Falcon: 7b, 40b and 180b, RW with a bias that grows with the distance. Source: transformers,
models/falcon/modeling_falcon.py."""

from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block, ParallelBlock
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.named import norm
from kvrun.runtime.layers.position import Rope, alibi_slopes
from kvrun.runtime.layers.qkv import Heads, cut_heads, grouped

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    embedding = Embedding(w, "transformer.word_embeddings", vocab, hidden)
    rope = Rope(c.rope(), heads(w).head_dim, w.dtype, w.device)
    blocks = [block(w, n, rope) for n in range(c.integer("num_hidden_layers"))]
    head = Head(w, "lm_head", embedding, tied=True)
    return Decoder(w, embedding, blocks, norm(w, "transformer.ln_f"), head)


def is_new(w: "Checkpoint") -> bool:
    c = w.config
    return c.flag("new_decoder_architecture", c.get("n_head_kv") is not None)


def heads(w: "Checkpoint") -> Heads:
    c = w.config
    count = c.integer("num_attention_heads")
    kv = count if not c.flag("multi_query", True) else 1
    kv = c.integer("num_kv_heads", count) if is_new(w) else kv
    return cut_heads(w, count, kv, c.integer("hidden_size") // count)


def block(w: "Checkpoint", n: int, rope: Rope | None) -> Block | ParallelBlock:
    c, h, p = w.config, heads(w), f"transformer.h.{n}"
    hidden, bias = c.integer("hidden_size"), c.flag("bias", False)
    qkv, out = grouped(h, hidden, f"{p}.self_attention.query_key_value"), "self_attention.dense"
    slopes = None
    if c.flag("alibi", False):  # added before the scores are scaled
        slopes, rope = alibi_slopes(h.heads, w.device) * h.head_dim**-0.5, None
    options: dict[str, Any] = {"qkv_bias": bias, "out_bias": bias, "rope": rope}
    attention = Attention(w, n, h, qkv, f"{p}.{out}", alibi=slopes, **options)
    up, down = (f"{p}.mlp.dense_{x}" for x in ("h_to_4h", "4h_to_h"))
    inner, act = c.integer("ffn_hidden_size", 4 * hidden), c.text("activation", "gelu")
    mlp = MLP(w, up, down, hidden=hidden, inner=inner, act=act, bias=bias)
    if c.integer("num_ln_in_parallel_attn", 2 if is_new(w) else 1) == 2:
        first, second = norm(w, f"{p}.ln_attn"), norm(w, f"{p}.ln_mlp")
        return ParallelBlock(first, attention, mlp, second)
    first = norm(w, f"{p}.input_layernorm")
    if is_new(w) or c.flag("parallel_attn", True):
        return ParallelBlock(first, attention, mlp)
    return Block(first, attention, norm(w, f"{p}.post_attention_layernorm"), mlp)
