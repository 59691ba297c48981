"""Qwen3: Llama with a norm on each query and key head. Source: transformers, models/qwen3."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import HeadNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n),
    )


def attention(w: "Checkpoint", n: int, rope: Rope) -> Attention:
    h, p = llama.heads(w), f"model.layers.{n}.self_attn"
    qk = HeadNorm(w, f"{p}.q_norm", f"{p}.k_norm", h, w.config.number("rms_norm_eps", 1e-6))
    return llama.attention(w, n, rope=rope, head_norm=qk, window=window(w, n))


def window(w: "Checkpoint", n: int) -> int | None:
    """The window counts only where `use_sliding_window` says so, on the layers named for it."""
    c = w.config
    if not c.flag("use_sliding_window", False) or c.get("sliding_window") is None:
        return None
    first = c.number("max_window_layers", 28)
    kinds = ["sliding_attention" if i >= first else "full_attention"
             for i in range(c.integer("num_hidden_layers"))]  # fmt: skip
    sliding = c.layer_types(kinds)[n] == "sliding_attention"
    return c.integer("sliding_window") if sliding else None
