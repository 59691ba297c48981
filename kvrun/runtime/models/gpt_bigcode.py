"""GPT-BigCode, StarCoder 1: GPT-2 with plain matrices, one key/value head or [q, k, v] per head.
Source: transformers, models/gpt_bigcode/modeling_gpt_bigcode.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.qkv import cut_heads, grouped, packed
from kvrun.runtime.models import gpt2

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return gpt2.decoder(w, "transformer.", attention, transposed=False)


def attention(w: "Checkpoint", n: int, p: str) -> Attention:
    c = w.config
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    single = c.flag("multi_query", True)
    h = cut_heads(w, count, 1 if single else count, hidden // count)
    qkv = (packed if single else grouped)(h, hidden, f"{p}.c_attn")
    scale = h.head_dim**-0.5 if c.flag("scale_attn_weights", True) else 1.0
    return Attention(w, n, h, qkv, f"{p}.c_proj", qkv_bias=True, out_bias=True, scale=scale)
