"""Phi 3 and 4: Llama with packed matrices, on part of a head rotated, and longrope scaling. Source:
transformers, models/phi3/modeling_phi3.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import packed
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5)
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, h, p = w.config, llama.heads(w), f"model.layers.{n}"
    hidden, window = c.integer("hidden_size"), c.integer_or_none("sliding_window")
    qkv = packed(h, hidden, f"{p}.self_attn.qkv_proj")
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        Attention(w, n, h, qkv, f"{p}.self_attn.o_proj", rope=rope, window=window),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        mlp(w, n),
    )


def mlp(w: "Checkpoint", n: int) -> GatedMLP:
    c, p = w.config, f"model.layers.{n}.mlp"
    return GatedMLP(
        w,
        [f"{p}.gate_up_proj"],
        f"{p}.down_proj",
        hidden=c.integer("hidden_size"),
        inner=c.integer("intermediate_size"),
        act=c.text("hidden_act", "silu"),
    )
