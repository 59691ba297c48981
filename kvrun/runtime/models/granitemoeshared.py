"""Granite with experts, and one that every token goes through. Source: transformers,
models/granitemoeshared/modeling_granitemoeshared.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import granite, granitemoe

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return granite.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    if not w.config.get("shared_intermediate_size"):
        return granitemoe.block(w, n, rope)
    inner = w.config.integer("shared_intermediate_size")
    return granitemoe.block(w, n, rope, shared(w, n, inner))


def shared(w: "Checkpoint", n: int, inner: int) -> GatedMLP:
    c, p = w.config, f"model.layers.{n}.shared_mlp"
    hidden, act = c.integer("hidden_size"), c.text("hidden_act", "silu")
    gate_up, down = [f"{p}.input_linear"], f"{p}.output_linear"
    return GatedMLP(w, gate_up, down, hidden=hidden, inner=inner, act=act)
