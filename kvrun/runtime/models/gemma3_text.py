"""Gemma 3, its text model: Gemma 2 with a norm on each query and key head, and slower rotations on
layers without a window. Source: transformers, models/gemma3/modeling_gemma3.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Sandwich
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import HeadNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import gemma2, llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint

# The 4b size says little more than what differs from this.
_USUAL = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    c.defaults(**_USUAL)
    c.refuse("use_bidirectional_attention", True)
    theta, size = c.number("rope_local_base_freq", 10000.0), llama.heads(w).head_dim
    local = c.rope("sliding_attention", theta=theta, scaled=False)
    ropes = [
        Rope(parameters, size, w.dtype, w.device)
        for parameters in (local, c.rope("full_attention", theta=1e6))
    ]
    cap = c.optional("final_logit_softcapping", 30.0) if c.get("final_logit_softcapping") else None
    scale = c.integer("hidden_size") ** 0.5
    return llama.decoder(
        w, block, norm=gemma2.norm, rope=ropes, embedding_scale=scale, tied=True, softcap=cap
    )


def block(w: "Checkpoint", n: int, ropes: list[Rope]) -> Sandwich:
    c, h, p = w.config, llama.heads(w), f"model.layers.{n}"
    window = c.window(n, every=c.integer("sliding_window_pattern", 6))
    q, k = f"{p}.self_attn.q_norm", f"{p}.self_attn.k_norm"
    qk = HeadNorm(w, q, k, h, c.number("rms_norm_eps", 1e-6), offset=1.0)
    attention = llama.attention(
        w,
        n,
        rope=ropes[window is None],
        head_norm=qk,
        scale=c.number("query_pre_attn_scalar", 256) ** -0.5,
        window=window,
    )
    return gemma2.sandwich(w, n, attention)
