"""OLMo: Llama with norms that have no weights, and queries, keys and values within bounds. Source:
transformers, models/olmo/modeling_olmo.py."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import LayerNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return llama.decoder(w, block, norm=norm)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    clip = w.config.number_or_none("clip_qkv")
    return Block(norm(w), llama.attention(w, n, rope=rope, clip=clip), norm(w), llama.mlp(w, n))


def norm(w: "Checkpoint", name: str = "") -> LayerNorm:
    ones = torch.ones(w.config.integer("hidden_size"), dtype=w.dtype, device=w.device)
    return LayerNorm(ones, None, 1e-5)
