"""Granite 4: layers of Mamba-2 or attention, with experts or without. Source: transformers,
models/granitemoehybrid/modeling_granitemoehybrid.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import AttentionPart, Block, Part, Scaled, ScaledAttention
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mamba import Mamba2, Sizes
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import granite, granitemoe, granitemoeshared, llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint

# Kinds of layers, as IBM's and as transformers' configurations call them.
ATTENTION = ("attention", "full_attention")
MAMBA = ("mamba", "linear_attention")


def build(w: "Checkpoint") -> Decoder:
    return granite.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, p = w.config, f"model.layers.{n}"
    factor = c.number("residual_multiplier", 1.0)
    shared = granitemoeshared.shared(w, n, c.integer("shared_intermediate_size", 1024))
    experts = c.count("num_local_experts", 8)
    mlp: Part = granitemoe.moe(w, n, shared) if experts else shared
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        ScaledAttention(mixer(w, n, rope), factor),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        Scaled(mlp, factor),
    )


def mixer(w: "Checkpoint", n: int, rope: Rope) -> AttentionPart:
    c = w.config
    kinds = c.layer_types(["mamba"] * c.integer("num_hidden_layers"), known=ATTENTION + MAMBA)
    if kinds[n] in ATTENTION:
        rotated = c.get("position_embedding_type") == "rope"
        return granite.attention(w, n, rope if rotated else None)
    size = Sizes(
        c.integer("hidden_size"),
        int(c.number("mamba_expand", 2) * c.integer("hidden_size")),
        c.integer("mamba_d_state", 256),
        c.integer("mamba_d_conv", 4),
        heads=c.integer("mamba_n_heads", 128),
        groups=c.integer("mamba_n_groups", 1),
        limit=c.limits("time_step_limit"),
        eps=c.number("rms_norm_eps", 1e-6),
        act=c.text("hidden_act", "silu"),
        bias=c.flag("mamba_proj_bias", False),
        conv_bias=c.flag("mamba_conv_bias", True),
    )
    return Mamba2(w, n, f"model.layers.{n}.mamba", size)
