"""OLMoE: Llama with experts, and one norm over all queries and one over all keys. Source:
transformers, models/olmoe/modeling_olmoe.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama, olmo2, qwen3_moe

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5)
    if w.config.get("clip_qkv") is not None:
        w.config.refuse("clip_qkv", w.config.get("clip_qkv"))
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p = f"model.layers.{n}"
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope, head_norm=olmo2.whole_norm(w, n)),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        qwen3_moe.moe(w, n, inner="intermediate_size"),
    )
