"""Llama 4, its text model: attention in chunks and rotation in pairs on three layers of four,
growing queries on the others, one expert a token. Source: transformers,
models/llama4/modeling_llama4.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block, Part
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.layers.moe import Changes, Experts, MoE, stacked
from kvrun.runtime.layers.norm import HeadNorm, RMSNorm
from kvrun.runtime.layers.position import GrowingQueries, Rope
from kvrun.runtime.layers.qkv import Heads
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    c.defaults(num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5)
    for count in (2, 3, 4):
        c.refuse("num_experts_per_tok", count)
    rope = Rope(
        c.rope(theta=500000.0), llama.heads(w).head_dim, w.dtype, w.device, interleaved=True
    )
    return llama.decoder(w, block, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        feed_forward(w, n),
    )


def attention(w: "Checkpoint", n: int, rope: Rope) -> Attention:
    c, h = w.config, llama.heads(w)
    every = c.integer("no_rope_layer_interval", 4)
    usual = [int(i % every != 0) for i in range(1, n + 2)]
    said = c.get("no_rope_layers")  # files may say an empty list
    rotated = (c.indices("no_rope_layers", usual, n + 1) if said else usual)[n]
    if rotated:
        size = c.optional("attention_chunk_size", 8192)
        chunk = None if size is None else int(size)
        qk = UnitNorm(w, h) if c.flag("use_qk_norm", True) else None
        return llama.attention(w, n, rope=rope, head_norm=qk, chunk=chunk)
    grown = None
    if c.flag("attn_temperature_tuning", True):
        beta, span = c.number("attn_scale", 0.1), c.number("floor_scale", 8192)
        grown = GrowingQueries(h, beta, span, shift=1)
    return llama.attention(w, n, head_norm=grown)


class UnitNorm(HeadNorm):
    """Without weights, so that it may come before the rotation as well as behind it."""

    def __init__(self, w: "Checkpoint", h: Heads) -> None:
        self.q = self.k = torch.ones(h.head_dim, device=w.device)
        self.eps = w.config.number("rms_norm_eps")
        self._norm = RMSNorm(self.q, self.eps)


def feed_forward(w: "Checkpoint", n: int) -> Part:
    c, p = w.config, f"model.layers.{n}.feed_forward"
    step = c.integer("interleave_moe_layer_step", 1)
    if n not in c.indices("moe_layers", list(range(step - 1, n + 1, step))):
        return mlp(w, p, c.integer("intermediate_size_mlp", 16384))
    shared = mlp(w, f"{p}.shared_expert", c.integer("intermediate_size"))
    return InputScaled(w, f"{p}.router", likeliest, experts(w, f"{p}.experts"), shared=shared)


def mlp(w: "Checkpoint", p: str, inner: int) -> GatedMLP:
    hidden, act = w.config.integer("hidden_size"), w.config.text("hidden_act", "silu")
    names = (f"{p}.gate_proj", f"{p}.up_proj")
    return GatedMLP(w, names, f"{p}.down_proj", hidden=hidden, inner=inner, act=act)


def likeliest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best, chosen = logits.max(-1, keepdim=True)
    return best.sigmoid(), chosen


def experts(w: "Checkpoint", p: str) -> Experts:
    """Stored [in, out], the gates before the ups."""
    c = w.config
    return stacked(
        w,
        f"{p}.gate_up_proj",
        f"{p}.down_proj",
        count=c.integer("num_local_experts", 16),
        hidden=c.integer("hidden_size"),
        inner=c.integer("intermediate_size"),
        act=c.text("hidden_act", "silu"),
        transposed=True,
    )


class InputScaled(MoE):
    """The router's weight scales what goes into the expert, not what comes out."""

    def _mixed(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, more: Changes = None
    ) -> torch.Tensor:
        return super()._mixed(x * weights.to(x.dtype), torch.ones_like(weights), chosen, more)
