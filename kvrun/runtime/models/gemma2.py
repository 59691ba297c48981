"""Gemma 2: sandwich norms, soft caps, a window on every other layer. Source: transformers,
models/gemma2/modeling_gemma2.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Sandwich
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import RMSNorm, rms_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(head_dim=256, num_key_value_heads=4)
    c = w.config
    c.refuse("use_bidirectional_attention", True)
    return llama.decoder(
        w,
        block,
        norm=norm,
        embedding_scale=c.integer("hidden_size") ** 0.5,
        tied=True,
        softcap=c.optional("final_logit_softcapping", 30.0),
    )


def block(w: "Checkpoint", n: int, rope: Rope) -> Sandwich:
    c = w.config
    attention = llama.attention(
        w,
        n,
        rope=rope,
        scale=c.number("query_pre_attn_scalar", 256) ** -0.5,
        softcap=c.optional("attn_logit_softcapping", 50.0),
        window=c.window(n, every=2),
    )
    return sandwich(w, n, attention)


def sandwich(w: "Checkpoint", n: int, attention: Attention) -> Sandwich:
    p = f"model.layers.{n}"
    return Sandwich(
        norm(w, f"{p}.input_layernorm"),
        attention,
        norm(w, f"{p}.post_attention_layernorm"),
        norm(w, f"{p}.pre_feedforward_layernorm"),
        llama.mlp(w, n, act=w.config.text("hidden_activation", "gelu_pytorch_tanh")),
        norm(w, f"{p}.post_feedforward_layernorm"),
    )


def norm(w: "Checkpoint", name: str) -> RMSNorm:
    size, eps = w.config.integer("hidden_size"), w.config.number("rms_norm_eps", 1e-6)
    return rms_norm(w, name, size, eps, offset=1.0)
