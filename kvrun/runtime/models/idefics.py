"""Idefics 9b: Llama, with gated attention to images before every so many-th layer. Source:
transformers, models/idefics/modeling_idefics.py."""

from dataclasses import replace
from typing import TYPE_CHECKING

from kvrun.runtime.layers.cross import CrossAttention, CrossDecoder, GatedCrossBlock
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import gated_mlp
from kvrun.runtime.layers.norm import RMSNorm, rms_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import separate
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> CrossDecoder:
    c = w.config
    c.defaults(vocab_size=32000, max_position_embeddings=2048, **llama.USUAL)
    c.replace(num_key_value_heads=c.integer("num_attention_heads"))  # whatever is said
    rope = Rope(c.rope(), llama.heads(w).head_dim, w.dtype, w.device)
    more = c.count("additional_vocab_size", 0)
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    embedding = Embedding(w, "model.embed_tokens", vocab, hidden, more=more)
    every = c.integer("cross_layer_interval", 1)
    blocks = [
        llama.block(w, n, rope) if n % every else seeing(w, n, n // every, rope)
        for n in range(c.integer("num_hidden_layers"))
    ]
    head = Head(w, "lm_head", embedding, tied=False)
    return CrossDecoder(w, embedding, blocks, llama.rms(w, "model.norm"), head)


def seeing(w: "Checkpoint", n: int, number: int, rope: Rope) -> GatedCrossBlock:
    """Layer n, behind the so many-th attention to images."""
    c, p = w.config, f"model.gated_cross_attn_layers.{number}"
    hidden = c.integer("hidden_size")
    shape = (1, 1, hidden) if c.text("alpha_type", "float") == "vector" else (1,)
    cross, dense = (
        w.read(f"{p}.alpha_{name}", shape).flatten() for name in ("cross_attn", "dense")
    )
    mlp = gated_mlp(w, f"{p}.mlp", c.integer("intermediate_size"))
    return GatedCrossBlock(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, f"{p}.cross_attn"),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        mlp,
        (cross, dense),
        llama.block(w, n, rope),
    )


def attention(w: "Checkpoint", n: int, p: str) -> CrossAttention:
    c, h = w.config, llama.heads(w)
    wide = c.part("vision_config").integer("embed_dim", 768)
    q, *kv = separate(h, c.integer("hidden_size"), f"{p}.q_proj", f"{p}.k_proj", f"{p}.v_proj")
    shards = [q, *(replace(shard, in_features=wide) for shard in kv)]

    def norm(name: str) -> RMSNorm:
        return rms_norm(w, f"{p}.{name}", h.head_dim, c.number("rms_norm_eps", 1e-6))

    norms = (
        (norm("q_layer_norm"), norm("k_layer_norm")) if c.flag("qk_layer_norms", False) else None
    )
    return CrossAttention(w, n, h, shards, f"{p}.o_proj", scale=h.head_dim**-0.5, norms=norms)
