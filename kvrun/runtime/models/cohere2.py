"""Command-R7B and Command-A: Command-R with positions only on layers with a window. Source:
transformers, models/cohere2/modeling_cohere2.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.block import ParallelBlock
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import cohere, llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    return cohere.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope) -> ParallelBlock:
    window = w.config.window(n, every=w.config.integer("sliding_window_pattern", 4))
    return ParallelBlock(
        cohere.norm(w, f"model.layers.{n}.input_layernorm"),
        llama.attention(w, n, rope=None if window is None else rope, window=window),
        llama.mlp(w, n),
    )
