"""Mamba, in the format of transformers or of its authors (state-spaces/mamba-*). Source:
transformers, models/mamba/modeling_mamba.py."""

from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mamba import Mamba, MambaBlock, NarrowNorm, Sizes, adopt
from kvrun.runtime.layers.norm import Norm, rms_norm

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    adopt(w)
    c = w.config
    hidden, rank = c.integer("hidden_size"), c.get("time_step_rank", "auto")
    rank = -(-hidden // 16) if rank == "auto" else c.integer("time_step_rank")
    inner = c.integer("intermediate_size", int(c.number("expand", 2) * hidden))
    return decoder(w, Mamba, inner=inner, state=c.integer("state_size", 16), rank=rank)


def decoder(w: "Checkpoint", mixer: Any, *, tied: bool = True, **sizes: Any) -> Decoder:
    """Blocks of one norm and one mixer each, under the names of both formats."""
    c = w.config
    hidden = c.integer("hidden_size")
    size = Sizes(
        hidden,
        taps=c.integer("conv_kernel", 4),
        eps=c.number("layer_norm_epsilon", 1e-5),
        act=c.text("hidden_act", "silu"),
        bias=c.flag("use_bias", False),
        conv_bias=c.flag("use_conv_bias", True),
        **sizes,
    )
    wide = c.flag("residual_in_fp32", True)
    embedding = Embedding(w, "backbone.embeddings", c.integer("vocab_size"), hidden)
    blocks = []
    for n in range(c.integer("num_hidden_layers")):
        p = f"backbone.layers.{n}"
        norm = rms_norm(w, f"{p}.norm", hidden, size.eps)
        blocks.append(MambaBlock(norm, mixer(w, n, f"{p}.mixer", size), w.dtype, wide))
    last: Norm = rms_norm(w, "backbone.norm_f", hidden, size.eps)
    last = NarrowNorm(last, w.dtype) if wide else last
    return Decoder(w, embedding, blocks, last, Head(w, "lm_head", embedding, tied=tied))
