"""OLMo 2: norms behind attention and MLP, and one norm over all queries and one over all keys.
Source: transformers, models/olmo2/modeling_olmo2.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Sandwich
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import WholeNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5)
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope, window: int | None = None) -> Sandwich:
    p = f"model.layers.{n}"
    return Sandwich(
        None,
        llama.attention(w, n, rope=rope, window=window, head_norm=whole_norm(w, n)),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        None,
        llama.mlp(w, n),
        llama.rms(w, f"{p}.post_feedforward_layernorm"),
    )


def whole_norm(w: "Checkpoint", n: int) -> WholeNorm:
    q, k = (f"model.layers.{n}.self_attn.{x}_norm" for x in "qk")
    return WholeNorm(w, q, k, llama.heads(w), w.config.number("rms_norm_eps", 1e-5))
