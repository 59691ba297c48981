"""Qwen 2 with experts, and one that every token goes through, behind a gate of its own. Source:
transformers, models/qwen2_moe/modeling_qwen2_moe.py."""

from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.linear import Linear
from kvrun.runtime.layers.mlp import gated_mlp
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import Shard
from kvrun.runtime.models import llama, qwen3_moe

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p, sparse = f"model.layers.{n}", qwen3_moe.is_sparse(w, n)
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        qwen3_moe.moe(w, n, shared=SharedExpert(w, n)) if sparse else llama.mlp(w, n),
    )


def attention(w: "Checkpoint", n: int, rope: Rope) -> Attention:
    c = w.config
    window = None
    if c.flag("use_sliding_window", False):
        first = c.integer("max_window_layers", 28)
        kinds = [i % 2 == 0 and i < first for i in range(c.integer("num_hidden_layers"))]
        named = c.layer_types(["sliding_attention" if k else "full_attention" for k in kinds])
        window = c.integer("sliding_window") if named[n] == "sliding_attention" else None
    return llama.attention(w, n, rope=rope, window=window, qkv_bias=c.flag("qkv_bias", True))


class SharedExpert:
    """sigmoid(gate(x)) · mlp(x)"""

    def __init__(self, w: "Checkpoint", n: int) -> None:
        c, p = w.config, f"model.layers.{n}.mlp"
        self._gate = Linear(w, Shard(f"{p}.shared_expert_gate", 1, c.integer("hidden_size")))
        inner = c.integer("shared_expert_intermediate_size")
        self._mlp = gated_mlp(w, f"{p}.shared_expert", inner)

    def __call__(
        self, x: torch.Tensor, batch: Any, add: Any = None, norm: Any = None
    ) -> torch.Tensor:
        x = x if norm is None else norm(x)
        y = self._mlp(x, batch).mul_(self._gate(x, batch).sigmoid_())
        return y if add is None else add.add_(y)
