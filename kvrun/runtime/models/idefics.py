"""Idefics 9b: Llama, with gated attention to images before every so many-th layer. Source:
transformers, models/idefics/modeling_idefics.py."""

from dataclasses import replace
from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.cross import CrossAttention, CrossDecoder, GatedCrossBlock, gates
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mlp import gated_mlp
from kvrun.runtime.layers.norm import rms_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import separate
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    c.defaults(vocab_size=32000, max_position_embeddings=2048, **llama.USUAL)
    c.replace(num_key_value_heads=c.integer("num_attention_heads"))  # whatever is said
    more = c.count("additional_vocab_size", 0)
    return llama.decoder(w, block, made=CrossDecoder, more=more)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block | GatedCrossBlock:
    every, behind = w.config.integer("cross_layer_interval", 1), llama.block(w, n, rope)
    if n % every:
        return behind
    p = f"model.gated_cross_attn_layers.{n // every}"
    vector = w.config.text("alpha_type", "float") == "vector"
    return GatedCrossBlock(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, f"{p}.cross_attn"),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        gated_mlp(w, f"{p}.mlp", w.config.integer("intermediate_size")),
        gates(w, f"{p}.alpha_cross_attn", f"{p}.alpha_dense", vector=vector),
        behind,
    )


def attention(w: "Checkpoint", n: int, p: str) -> CrossAttention:
    c, h = w.config, llama.heads(w)
    wide = c.part("vision_config").integer("embed_dim", 768)
    q, *kv = separate(h, c.integer("hidden_size"), f"{p}.q_proj", f"{p}.k_proj", f"{p}.v_proj")
    shards = [q, *(replace(shard, in_features=wide) for shard in kv)]
    norms = None
    if c.flag("qk_layer_norms", False):
        names, eps = (f"{p}.q_layer_norm", f"{p}.k_layer_norm"), c.number("rms_norm_eps", 1e-6)
        norms = [rms_norm(w, name, h.head_dim, eps) for name in names]
    return CrossAttention(w, n, h, shards, f"{p}.o_proj", scale=h.head_dim**-0.5, norms=norms)
