"""GPT-2, and the first SantaCoder, which is GPT-2 with one key/value head. Source: transformers,
models/gpt2/modeling_gpt2.py; for SantaCoder its model card."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.named import norm
from kvrun.runtime.layers.position import LearnedPositions
from kvrun.runtime.layers.qkv import cut_heads, in_two, packed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return decoder(w, w.prefix("wte.weight", "transformer.", ""), attention, transposed=True)


def decoder(w: "Checkpoint", p: str, attention: Any, *, transposed: bool) -> Decoder:
    c = w.config
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    tokens = Embedding(w, f"{p}wte", vocab, hidden)
    places = c.integer("max_position_embeddings", 1024)
    embedding = LearnedPositions(w, tokens, f"{p}wpe", places, hidden)
    blocks = [
        block(w, f"{p}h.{n}", attention(w, n, f"{p}h.{n}.attn"), transposed)
        for n in range(c.integer("num_hidden_layers"))
    ]
    head = Head(w, "lm_head", tokens, tied=True)
    return Decoder(w, embedding, blocks, norm(w, f"{p}ln_f"), head)


def block(w: "Checkpoint", p: str, attention: Attention, transposed: bool) -> Block:
    c, hidden = w.config, w.config.integer("hidden_size")
    act, inner = c.text("activation_function", "gelu_new"), c.integer("n_inner", 4 * hidden)
    options: Any = {"hidden": hidden, "inner": inner, "act": act, "transposed": transposed}
    mlp = MLP(w, f"{p}.mlp.c_fc", f"{p}.mlp.c_proj", **options)
    return Block(norm(w, f"{p}.ln_1"), attention, norm(w, f"{p}.ln_2"), mlp)


def attention(w: "Checkpoint", n: int, p: str) -> Attention:
    c = w.config
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    single = c.text("attention_head_type", "multihead") == "multiquery"
    h = cut_heads(w, count, 1 if single else count, hidden // count)
    qkv = packed(h, hidden, f"{p}.c_attn")
    if single:
        qkv = in_two(h, hidden, f"{p}.q_attn", f"{p}.kv_attn")
    qkv = [replace(shard, transposed=True) for shard in qkv]
    scale = h.head_dim**-0.5 if c.flag("scale_attn_weights", True) else 1.0
    if c.flag("scale_attn_by_inverse_layer_idx", False):
        scale /= n + 1
    return Attention(w, n, h, qkv, f"{p}.c_proj", qkv_bias=True, out_bias=True, scale=scale)
