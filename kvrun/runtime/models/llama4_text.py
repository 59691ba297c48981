"""Llama 4, its text model: attention in chunks and rotation in pairs on three layers of four,
growing queries on the others, one expert a token. Source: transformers,
models/llama4/modeling_llama4.py."""

from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block, Part
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mlp import gated_mlp
from kvrun.runtime.layers.moe import InputScaled, sigmoid_of_best, stacked
from kvrun.runtime.layers.norm import UnitNorm
from kvrun.runtime.layers.position import GrowingQueries, Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    c.defaults(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5)
    for count in (2, 3, 4):
        c.refuse("num_experts_per_tok", count)
    rope = llama.rotation(w, theta=500000.0, interleaved=True)
    return llama.decoder(w, block, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    return llama.layer(w, n, attention(w, n, rope), feed_forward(w, n))


def attention(w: "Checkpoint", n: int, rope: Rope) -> Attention:
    c, h = w.config, llama.heads(w)
    if llama.rotated(w, n):
        size = c.optional("attention_chunk_size", 8192)
        chunk = None if size is None else int(size)
        known = c.flag("use_qk_norm", True)
        qk = UnitNorm(h.head_dim, c.number("rms_norm_eps"), w.device) if known else None
        return llama.attention(w, n, rope=rope, head_norm=qk, chunk=chunk)
    grown = None
    if c.flag("attn_temperature_tuning", True):
        beta, span = c.number("attn_scale", 0.1), c.number("floor_scale", 8192)
        grown = GrowingQueries(h, beta, span, shift=1)
    return llama.attention(w, n, head_norm=grown)


def feed_forward(w: "Checkpoint", n: int) -> Part:
    c, p = w.config, f"model.layers.{n}.feed_forward"
    step = c.integer("interleave_moe_layer_step", 1)
    if n not in c.indices("moe_layers", list(range(step - 1, n + 1, step))):
        return gated_mlp(w, p, c.integer("intermediate_size_mlp", 16384))
    hidden, inner = c.integer("hidden_size"), c.integer("intermediate_size")
    sizes: Any = {"count": c.integer("num_local_experts", 16), "hidden": hidden, "inner": inner}
    # Stored [in, out], the gates before the ups.
    sizes |= {"act": c.text("hidden_act", "silu"), "transposed": True}
    up, down = f"{p}.experts.gate_up_proj", f"{p}.experts.down_proj"
    shared = gated_mlp(w, f"{p}.shared_expert", inner)
    experts = stacked(w, up, down, **sizes)
    return InputScaled(w, f"{p}.router", sigmoid_of_best, experts, shared=shared)
