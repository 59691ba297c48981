"""T5, Flan-T5: an encoder reads the prompt, a decoder attends to it; biases by distance.
Source: transformers, models/t5/modeling_t5.py."""

from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import Residual
from kvrun.runtime.layers.cross import CrossAttention
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.encoder import EncoderAttention, EncoderDecoder
from kvrun.runtime.layers.mlp import gated_or_plain
from kvrun.runtime.layers.named import heads, rms
from kvrun.runtime.layers.position import relative_biases
from kvrun.runtime.layers.qkv import separate

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint", *, scaled: bool = True, every: bool = False) -> EncoderDecoder:
    """`scaled`: logits of a tied head shrink with the width. `every` layer has its own biases."""
    c, size = w.config, w.config.integer("hidden_size")
    w.refuse_float16()
    c.defaults(rms_norm_eps=c.number("layer_norm_epsilon", 1e-6))
    old = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias."
    w.skip("encoder.embed_tokens.", "decoder.embed_tokens.", old)
    embedding = Embedding(w, "shared", c.integer("vocab_size"), size, several=True)
    encoder, decoder = stack(w, "encoder", every), stack(w, "decoder", every)
    first, last = (rms(w, f"{half}.final_layer_norm") for half in ("encoder", "decoder"))
    # Files of v1.1 say that the head is not tied; newer ones say what follows from it.
    shrinks = c.flag("scale_decoder_outputs", c.get("tie_word_embeddings") is not False)
    scale = size**-0.5 if scaled and shrinks else None
    head = Head(w, "lm_head", embedding, tied=True, scale=scale)
    start = c.count("decoder_start_token_id", c.count("pad_token_id", 0))
    return EncoderDecoder(w, embedding, encoder, first, decoder, last, head, start_id=start)


def stack(w: "Checkpoint", half: str, every: bool) -> list[Residual]:
    c, reads = w.config, half == "encoder"
    count = c.integer("num_layers")
    count = count if reads else c.integer("num_decoder_layers", count)
    table = half + ".block.{}.layer.0.SelfAttention.relative_attention_bias"
    biases = relative_biases(w, table, heads(w), count, every=every, both=reads)
    return [block(w, n, f"{half}.block.{n}.layer", bias) for n, bias in enumerate(biases)]


def block(w: "Checkpoint", n: int, p: str, bias: Any) -> Residual:
    of_self, of_cross = f"{p}.0.SelfAttention", f"{p}.1.EncDecAttention"
    parts: list[Any] = [EncoderAttention(w, *matrices(w, of_self), scale=1.0, bias=bias)]
    if p.startswith("decoder"):
        own = Attention(w, n, *matrices(w, of_self), scale=1.0, relative=bias.behind)
        parts = [own, CrossAttention(w, n, *matrices(w, of_cross), scale=1.0)]
    dense, kind = f"{p}.{len(parts)}.DenseReluDense", w.config.text("feed_forward_proj", "relu")
    parts.append(gated_or_plain(w, f"{dense}.wi", f"{dense}.wo", kind))
    return Residual([(rms(w, f"{p}.{i}.layer_norm"), part) for i, part in enumerate(parts)])


def matrices(w: "Checkpoint", p: str) -> tuple[Any, ...]:
    qkv = separate(heads(w), w.config.integer("hidden_size"), f"{p}.q", f"{p}.k", f"{p}.v")
    return heads(w), qkv, f"{p}.o"
