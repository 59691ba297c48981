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
    c, p = w.config, f"model.layers.{n}.shared_mlp"
    if not c.get("shared_intermediate_size"):
        return granitemoe.block(w, n, rope)
    shared = GatedMLP(
        w,
        [f"{p}.input_linear"],
        f"{p}.output_linear",
        hidden=c.integer("hidden_size"),
        inner=c.integer("shared_intermediate_size"),
        act=c.text("hidden_act", "silu"),
    )
    return granitemoe.block(w, n, rope, shared)
