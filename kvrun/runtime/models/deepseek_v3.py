"""DeepSeek V3 and R1: latent attention, experts chosen by groups, one that all tokens go through.
Source: transformers, models/deepseek_v3/modeling_deepseek_v3.py."""

from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.block import Block, Part
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.mla import MLA
from kvrun.runtime.layers.position import Rope, yarn_growth
from kvrun.runtime.layers.shared_moe import shared_moe, sigmoid_groups
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(n_group=8, topk_group=4, routed_scaling_factor=2.5, first_k_dense_replace=3)
    return decoder(w, block, pairs=w.config.flag("rope_interleave", True))


def decoder(w: "Checkpoint", block: Any, *, pairs: bool) -> Decoder:
    c = w.config
    size = c.integer("qk_rope_head_dim")
    rope = Rope(c.rope(), size, w.dtype, w.device, interleaved=pairs)
    return llama.decoder(w, block, rope=rope)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention(w, n, rope),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        mlp(w, n),
    )


def mlp(w: "Checkpoint", n: int) -> Part:
    """Dense on the first layers, then experts."""
    if n < w.config.count("first_k_dense_replace"):
        return llama.mlp(w, n)
    p = f"model.layers.{n}.mlp"
    return shared_moe(w, p, sigmoid_groups(w, f"{p}.gate"))


def attention(w: "Checkpoint", n: int, rope: Rope) -> MLA:
    c = w.config
    size = c.integer("qk_nope_head_dim") + c.integer("qk_rope_head_dim")
    scale = size**-0.5 * yarn_growth(c.rope())
    return MLA(w, n, f"model.layers.{n}.self_attn", rope=rope, scale=scale)
