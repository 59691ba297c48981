"""gpt-oss: experts with biases and a clamped gate, a sink per head, a window on every other layer.
Source: transformers, models/gpt_oss/modeling_gpt_oss.py."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.moe import MoE, stacked, top_softmax
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5, head_dim=64)
    theta = w.config.number("rope_theta", 150000.0)
    rope = Rope(w.config.rope(theta=theta), llama.heads(w).head_dim, w.dtype, w.device)
    return llama.decoder(w, block, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, p, h = w.config, f"model.layers.{n}", llama.heads(w)
    bias = c.flag("attention_bias", True)
    sinks = w.read(f"{p}.self_attn.sinks", (h.heads,), dtype=torch.float32)
    window = c.window(n, every=2, size=128)
    options = {"rope": rope, "window": window, "sinks": sinks, "qkv_bias": bias, "out_bias": bias}
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, **options),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        moe(w, f"{p}.mlp"),
    )


def moe(w: "Checkpoint", p: str) -> MoE:
    """Gates and ups alternate in the file, and plain matrices are stored [in, out]."""
    c = w.config
    count, hidden = c.integer("num_local_experts"), c.integer("hidden_size")
    inner = c.integer("intermediate_size")
    up, down = f"{p}.experts.gate_up_proj", f"{p}.experts.down_proj"
    sizes = {"count": count, "hidden": hidden, "inner": inner}
    experts = stacked(w, up, down, act="clamped", transposed=True, alternate=True, **sizes)
    first, last = w.group.cut(inner, p)
    biases = w.read(f"{up}_bias", (count, 2 * inner), (None, ((2 * first, 2 * last),)))
    down_bias = w.read(f"{down}_bias", (count, hidden))
    experts = replace(
        experts,
        gate_up_bias=torch.cat((biases[:, ::2], biases[:, 1::2]), 1),
        down_bias=down_bias if w.group.rank == 0 else down_bias * 0,  # once in the sum over ranks
        limit=c.number("swiglu_limit", 7.0),
    )
    route = top_softmax(c.integer("num_experts_per_tok"))
    return MoE(w, f"{p}.router", route, experts, bias=True)
