"""Gemma: Llama with norms stored minus one, a scaled embedding and a tanh-gelu gate. Source:
transformers, models/gemma/modeling_gemma.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import gemma2, llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(head_dim=256)
    w.config.refuse("use_bidirectional_attention", True)
    scale = w.config.integer("hidden_size") ** 0.5
    return llama.decoder(w, block, norm=gemma2.norm, embedding_scale=scale, tied=True)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    p, act = f"model.layers.{n}", w.config.text("hidden_act", "gelu_pytorch_tanh")
    return Block(
        gemma2.norm(w, f"{p}.input_layernorm"),
        llama.attention(w, n, rope=rope),
        gemma2.norm(w, f"{p}.post_attention_layernorm"),
        # The first files say "gelu" and were trained with the tanh form.
        llama.mlp(w, n, act="gelu_pytorch_tanh" if act == "gelu" else act),
    )
