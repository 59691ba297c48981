"""GLM 4.5 and 4.6: experts chosen as in DeepSeek V3, half of each head rotated, norms of query and
key heads in some sizes. Source: transformers, models/glm4_moe/modeling_glm4_moe.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import HeadNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import deepseek_v3, llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5, first_k_dense_replace=1)
    rope = Rope(w.config.rope(partial=0.5), llama.heads(w).head_dim, w.dtype, w.device)
    return llama.decoder(w, block, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        deepseek_v3.mlp(w, n),
    )


def attention(w: "Checkpoint", n: int, rope: Rope) -> Attention:
    c, h, p = w.config, llama.heads(w), f"model.layers.{n}.self_attn"
    qk = None
    if c.flag("use_qk_norm", False):
        qk = HeadNorm(w, f"{p}.q_norm", f"{p}.k_norm", h, c.number("rms_norm_eps", 1e-5))
    return llama.attention(w, n, rope=rope, head_norm=qk, out_bias=False)
