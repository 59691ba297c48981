"""GPT-2, and the first SantaCoder, which is GPT-2 with one key/value head. Source: transformers,
models/gpt2/modeling_gpt2.py; for SantaCoder its model card."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.norm import LayerNorm, layer_norm
from kvrun.runtime.layers.position import LearnedPositions
from kvrun.runtime.layers.qkv import Heads, Shard, cut_heads, packed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return decoder(w, prefix(w, "wte", "transformer.", ""), attention, transposed=True)


def decoder(w: "Checkpoint", p: str, attention: Any, *, transposed: bool) -> Decoder:
    c = w.config
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    tokens = Embedding(w, f"{p}wte", vocab, hidden)
    places = c.integer("max_position_embeddings", 1024)
    embedding = LearnedPositions(w, tokens, f"{p}wpe", places, hidden)
    blocks = [
        Block(
            norm(w, f"{p}h.{n}.ln_1"),
            attention(w, n, f"{p}h.{n}.attn"),
            norm(w, f"{p}h.{n}.ln_2"),
            MLP(
                w,
                f"{p}h.{n}.mlp.c_fc",
                f"{p}h.{n}.mlp.c_proj",
                hidden=hidden,
                inner=c.integer("n_inner", 4 * hidden),
                act=c.text("activation_function", "gelu_new"),
                transposed=transposed,
            ),
        )
        for n in range(c.integer("num_hidden_layers"))
    ]
    head = Head(w, "lm_head", tokens, tied=True)
    return Decoder(w, embedding, blocks, norm(w, f"{p}ln_f"), head)


def prefix(w: "Checkpoint", embedding: str, *choices: str) -> str:
    """What stands before the names in the file: the first choice that finds the embedding."""
    found = (p for p in choices if w.has(f"{p}{embedding}.weight", otherwise=True))
    return next(found, choices[0])


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    c = w.config
    return layer_norm(w, name, c.integer("hidden_size"), c.number("layer_norm_epsilon", 1e-5))


def attention(w: "Checkpoint", n: int, p: str) -> Attention:
    c = w.config
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    single = c.text("attention_head_type", "multihead") == "multiquery"
    h = cut_heads(w, count, 1 if single else count, hidden // count)
    qkv = single_head(h, hidden, p) if single else packed(h, hidden, f"{p}.c_attn")
    qkv = [replace(shard, transposed=True) for shard in qkv]
    scale = h.head_dim**-0.5 if c.flag("scale_attn_weights", True) else 1.0
    if c.flag("scale_attn_by_inverse_layer_idx", False):
        scale /= n + 1
    return Attention(w, n, h, qkv, f"{p}.c_proj", qkv_bias=True, out_bias=True, scale=scale)


def single_head(h: Heads, hidden: int, p: str) -> list[Shard]:
    """SantaCoder's: one tensor of queries, one of the only key and value head."""
    queries = Shard(f"{p}.q_attn", h.heads * h.head_dim, hidden, rows=h.scaled(h.mine))
    return [queries, Shard(f"{p}.kv_attn", 2 * h.head_dim, hidden)]
