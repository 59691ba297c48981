"""OPT and Galactica: learned positions from row 2 on; 350m norms behind the sum and projects its
embedding. Source: transformers, models/opt/modeling_opt.py."""

from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.linear import Linear
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.norm import LayerNorm, adapted, layer_norm
from kvrun.runtime.layers.position import LearnedPositions
from kvrun.runtime.layers.qkv import Shard, cut_heads, separate
from kvrun.runtime.models import gpt2

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    p = gpt2.prefix(w, "embed_tokens", "model.decoder.", "decoder.")
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    narrow = c.integer("word_embed_proj_dim", hidden)
    tokens: Any = Embedding(w, f"{p}embed_tokens", vocab, narrow)
    head: Any = Head(w, "lm_head", tokens, tied=True)
    if narrow != hidden:
        tokens = Widened(tokens, Linear(w, Shard(f"{p}project_in", hidden, narrow)))
        head = Narrowed(head, Linear(w, Shard(f"{p}project_out", narrow, hidden)))
    places = c.integer("max_position_embeddings", 2048)
    embedding = LearnedPositions(w, tokens, f"{p}embed_positions", places, hidden, offset=2)
    blocks = [block(w, n, f"{p}layers.{n}") for n in range(c.integer("num_hidden_layers"))]
    bare = not c.flag("do_layer_norm_before", True) or c.flag("_remove_final_layer_norm", False)
    last = None if bare else norm(w, f"{p}final_layer_norm")
    return Decoder(w, embedding, blocks, last, head)


def block(w: "Checkpoint", n: int, p: str) -> Block:
    c = w.config
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    h, bias = cut_heads(w, count, count, hidden // count), c.flag("enable_bias", True)
    q, k, v, out = (f"{p}.self_attn.{x}_proj" for x in ("q", "k", "v", "out"))
    qkv, inner = separate(h, hidden, q, k, v), c.integer("ffn_dim")
    act = c.text("activation_function", "relu")
    return (Block if c.flag("do_layer_norm_before", True) else PostBlock)(
        norm(w, f"{p}.self_attn_layer_norm"),
        Attention(w, n, h, qkv, out, qkv_bias=bias, out_bias=bias),
        norm(w, f"{p}.final_layer_norm"),
        MLP(w, f"{p}.fc1", f"{p}.fc2", hidden=hidden, inner=inner, act=act, bias=bias),
    )


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    size = w.config.integer("hidden_size")
    if w.config.flag("layer_norm_elementwise_affine", True):
        return layer_norm(w, name, size, 1e-5)
    return LayerNorm(torch.ones(size, dtype=w.dtype, device=w.device), None, 1e-5)


class PostBlock(Block):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __call__(self, x: torch.Tensor, batch: Any) -> torch.Tensor:
        x = adapted(self._attention_norm, batch)(self._attention(x, batch, add=x))
        return adapted(self._mlp_norm, batch)(self._mlp(x, batch, add=x))


class Widened:
    """An embedding, projected to the width of the layers."""

    def __init__(self, embedding: Embedding, project: Linear) -> None:
        self._embedding = embedding
        self._project = project

    def __call__(self, batch: Any) -> torch.Tensor:
        return self._project(self._embedding(batch), batch)


class Narrowed:
    """A head behind a projection to the width of the embedding."""

    def __init__(self, head: Head, project: Linear) -> None:
        self._head = head
        self._project = project
        self.vocab_size, self.softcapped = head.vocab_size, head.softcapped
        self.copy_bytes = head.copy_bytes

    def __call__(self, x: torch.Tensor, batch: Any, norm: Any, out: Any = None) -> torch.Tensor:
        return self._head(self._project(x, batch, before=norm), batch, None, out)
