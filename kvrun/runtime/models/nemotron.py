"""Nemotron: LayerNorm stored minus one, a plain MLP with a squared relu. Source: transformers,
models/nemotron/modeling_nemotron.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.norm import LayerNorm, layer_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    rope = Rope(w.config.rope(partial=0.5), llama.heads(w).head_dim, w.dtype, w.device)
    return llama.decoder(w, block, norm=norm, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        norm(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope),
        norm(w, f"{p}.post_attention_layernorm"),
        mlp(w, n),
    )


def mlp(w: "Checkpoint", n: int) -> MLP:
    c, p = w.config, f"model.layers.{n}.mlp"
    return MLP(
        w,
        f"{p}.up_proj",
        f"{p}.down_proj",
        hidden=c.integer("hidden_size"),
        inner=c.integer("intermediate_size"),
        act=c.text("hidden_act", "relu2"),
        bias=c.flag("mlp_bias", False),
    )


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    c = w.config
    size, eps = c.integer("hidden_size"), c.number("norm_eps", 1e-5)
    return layer_norm(w, name, size, eps, offset=1.0)
