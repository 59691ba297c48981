"""Baichuan 1 and 2: Llama with packed projections; 13B knows distances instead of positions, and
version 2 normalises the rows of its head. Source: modeling_baichuan.py beside its weights."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope, alibi_slopes
from kvrun.runtime.layers.qkv import packed
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint

# Nothing in a config.json says either: the width tells 7B from 13B, the vocabulary 1 from 2.
ROTATED_HIDDEN = 4096
NORMED_VOCAB = 125696


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    normed = c.integer("vocab_size") == NORMED_VOCAB
    return llama.decoder(w, block, scale=inverse_norms(w) if normed else None)


def block(w: "Checkpoint", n: int, rope: Rope) -> Block:
    h, hidden, p = llama.heads(w), w.config.integer("hidden_size"), f"model.layers.{n}"
    rotated = hidden == ROTATED_HIDDEN
    attention = Attention(
        w,
        n,
        h,
        packed(h, hidden, f"{p}.self_attn.W_pack"),
        f"{p}.self_attn.o_proj",
        rope=rope if rotated else None,
        alibi=None if rotated else alibi_slopes(h.heads, w.device),
    )
    return Block(
        llama.rms(w, f"{p}.input_layernorm"),
        attention,
        llama.rms(w, f"{p}.post_attention_layernorm"),
        llama.mlp(w, n),
    )


def inverse_norms(w: "Checkpoint") -> torch.Tensor:
    """One over the length of each row of the head: what normalising the rows does to logits."""
    c = w.config
    rows = w.read("lm_head.weight", (c.integer("vocab_size"), c.integer("hidden_size")))
    w.parameter_bytes -= rows.nbytes  # the head reads them again, and keeps them
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return lengths.reciprocal_().to(w.dtype)
