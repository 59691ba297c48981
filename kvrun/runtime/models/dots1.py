"""dots.llm1: Qwen 3 with the experts of DeepSeek V3. Source: transformers,
models/dots1/modeling_dots1.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.norm import HeadNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import deepseek_v3, llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(first_k_dense_replace=0, norm_topk_prob=False)
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    c, h, p = w.config, llama.heads(w), f"model.layers.{n}"
    q, k = f"{p}.self_attn.q_norm", f"{p}.self_attn.k_norm"
    first, layers = c.integer("max_window_layers", 62), range(c.integer("num_hidden_layers"))
    c.defaults(
        layer_types=["sliding_attention" if i >= first else "full_attention" for i in layers]
    )
    qk = HeadNorm(w, q, k, h, c.number("rms_norm_eps", 1e-6))
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, head_norm=qk, window=c.window(n)),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        deepseek_v3.mlp(w, n),
    )
