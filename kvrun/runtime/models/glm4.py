"""GLM 4: GLM with norms on both sides of attention and MLP. Source: transformers,
models/glm4/modeling_glm4.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Sandwich
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import glm, llama, phi3

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1.5625e-7, num_key_value_heads=2, head_dim=128)
    return llama.decoder(w, block, rope=glm.rope(w))


def block(w: "Checkpoint", n: int, rope: Rope) -> Sandwich:
    p = f"model.layers.{n}"
    return Sandwich(
        llama.rms(w, f"{p}.input_layernorm"),
        glm.attention(w, n, rope),
        llama.rms(w, f"{p}.post_self_attn_layernorm"),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        phi3.mlp(w, n),
        llama.rms(w, f"{p}.post_mlp_layernorm"),
    )
