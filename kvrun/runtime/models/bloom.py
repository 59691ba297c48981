"""Bloom: a bias that grows with the distance, a norm behind the embedding, [q, k, v] per head.
Source: transformers, models/bloom/modeling_bloom.py."""

from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.named import norm
from kvrun.runtime.layers.norm import adapted
from kvrun.runtime.layers.position import alibi_slopes
from kvrun.runtime.layers.qkv import cut_heads, grouped

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    p = w.prefix("word_embeddings.weight", "transformer.", "")
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    embedding = Embedding(w, f"{p}word_embeddings", vocab, hidden)
    first = norm(w, f"{p}word_embeddings_layernorm")
    slopes = alibi_slopes(c.integer("num_attention_heads"), w.device)
    layers = range(c.integer("num_hidden_layers"))
    blocks = [block(w, n, f"{p}h.{n}", slopes) for n in layers]
    head = Head(w, "lm_head", embedding, tied=True)
    last = norm(w, f"{p}ln_f")
    return Decoder(w, lambda batch: first(embedding(batch)), blocks, last, head)


def block(w: "Checkpoint", n: int, p: str, slopes: torch.Tensor) -> Block:
    c = w.config
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    h = cut_heads(w, count, count, hidden // count)
    qkv, out = (
        grouped(h, hidden, f"{p}.self_attention.query_key_value"),
        f"{p}.self_attention.dense",
    )
    up, down = f"{p}.mlp.dense_h_to_4h", f"{p}.mlp.dense_4h_to_h"
    normed = c.flag("apply_residual_connection_post_layernorm", False)
    return (NormedBlock if normed else Block)(
        norm(w, f"{p}.input_layernorm"),
        Attention(w, n, h, qkv, out, qkv_bias=True, out_bias=True, alibi=slopes),
        norm(w, f"{p}.post_attention_layernorm"),
        MLP(w, up, down, hidden=hidden, inner=4 * hidden, act="gelu_pytorch_tanh"),
    )


class NormedBlock(Block):
    """The residual stream goes on from what the norms make of it."""

    def __call__(self, x: torch.Tensor, batch: Any) -> torch.Tensor:
        x = adapted(self._attention_norm, batch)(x)
        x = adapted(self._mlp_norm, batch)(self._attention(x, batch, add=x))
        return self._mlp(x, batch, add=x)
