"""EXAONE 4: norms behind attention and MLP and on each query and key head, positions only on layers
with a window. Source: transformers, models/exaone4/modeling_exaone4.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Sandwich
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import HeadNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5)
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Sandwich:
    c, h, p = w.config, llama.heads(w), f"model.layers.{n}"
    every = c.get("sliding_window_pattern", 4)
    window = c.window(n, every=every if isinstance(every, int) else 4)
    everywhere = c.optional("sliding_window", 4096) is None
    q, k = f"{p}.self_attn.q_norm", f"{p}.self_attn.k_norm"
    attention = llama.attention(
        w,
        n,
        rope=rope if everywhere or window is not None else None,
        head_norm=HeadNorm(w, q, k, h, c.number("rms_norm_eps")),
        window=window,
    )
    after = (llama.rms(w, f"{p}.post_{x}_layernorm") for x in ("attention", "feedforward"))
    return Sandwich(None, attention, next(after), None, llama.mlp(w, n), next(after))
