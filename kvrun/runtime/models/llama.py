"""Llama 1, 2, 3 and their relatives. Source: transformers, models/llama/modeling_llama.py."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder, Layer
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.layers.norm import Norm, RMSNorm, rms_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import Heads, cut_heads, separate

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


# Text parts of models that see images say little more than what differs from this.
USUAL = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(**USUAL)
    return decoder(w, block)


def decoder(
    w: "Checkpoint",
    block: Callable[["Checkpoint", int, Any], Layer],
    *,
    norm: Callable[["Checkpoint", str], Norm] | None = None,
    rope: Any = None,
    embedding_scale: float | None = None,
    final_norm: str = "model.norm",
    **head: Any,
) -> Decoder:
    """Embedding, blocks, norm and head under Llama's names; `head` are options of Head.

    `rope` is what blocks are handed, Llama's own where it is None.
    """
    c = w.config
    rope = rope or Rope(c.rope(), heads(w).head_dim, w.dtype, w.device)
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    embedding = Embedding(w, "model.embed_tokens", vocab, hidden, scale=embedding_scale)
    blocks = [block(w, n, rope) for n in range(c.integer("num_hidden_layers"))]
    last = (norm or rms)(w, final_norm)
    return Decoder(
        w, embedding, blocks, last, Head(w, "lm_head", embedding, **{"tied": False} | head)
    )


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope=rope),
        rms(w, f"{p}.post_attention_layernorm"),
        mlp(w, n, bias=w.config.flag("mlp_bias", False)),
    )


def heads(w: "Checkpoint") -> Heads:
    c = w.config
    count = c.integer("num_attention_heads")
    head_dim = c.integer("head_dim", c.integer("hidden_size") // count)
    return cut_heads(w, count, c.integer("num_key_value_heads", count), head_dim)


def rms(w: "Checkpoint", name: str) -> RMSNorm:
    return rms_norm(w, name, w.config.integer("hidden_size"), w.config.number("rms_norm_eps", 1e-6))


def attention(w: "Checkpoint", n: int, **options: Any) -> Attention:
    c, h, p = w.config, heads(w), f"model.layers.{n}.self_attn"
    qkv = separate(h, c.integer("hidden_size"), f"{p}.q_proj", f"{p}.k_proj", f"{p}.v_proj")
    bias = c.flag("attention_bias", False)
    options = {"qkv_bias": bias, "out_bias": bias, "out": f"{p}.o_proj", **options}
    return Attention(w, n, h, qkv, **options)


def mlp(w: "Checkpoint", n: int, *, act: str = "", bias: bool = False) -> GatedMLP:
    c, p = w.config, f"model.layers.{n}.mlp"
    size, inner = c.integer("hidden_size"), c.integer("intermediate_size")
    gate_up, act = (f"{p}.gate_proj", f"{p}.up_proj"), act or c.text("hidden_act", "silu")
    return GatedMLP(w, gate_up, f"{p}.down_proj", hidden=size, inner=inner, act=act, bias=bias)
