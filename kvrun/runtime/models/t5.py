"""T5, Flan-T5: an encoder reads the prompt, a decoder attends to it; biases by distance.
Source: transformers, models/t5/modeling_t5.py."""

from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.cross import CrossAttention, CrossBlock
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.encoder import (
    EncoderAttention,
    EncoderBlock,
    EncoderDecoder,
    refuse_float16,
)
from kvrun.runtime.layers.mlp import MLP, GatedMLP
from kvrun.runtime.layers.norm import RMSNorm, rms_norm
from kvrun.runtime.layers.position import RelativeBias
from kvrun.runtime.layers.qkv import Heads, cut_heads, separate

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint", *, scaled: bool = True, every: bool = False) -> EncoderDecoder:
    """`scaled`: logits of a tied head shrink with the width. `every` layer has its own biases."""
    c, size = w.config, w.config.integer("hidden_size")
    refuse_float16(w)
    old = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias."
    w.skip("encoder.embed_tokens.", "decoder.embed_tokens.", old)
    # Encoder and decoder each have it under a name of their own.
    embedding = Embedding(w, "shared", c.integer("vocab_size"), size, several=True)
    counts = c.integer("num_layers"), c.integer("num_decoder_layers", c.integer("num_layers"))
    biases = [_biases(w, "encoder", counts[0], every), _biases(w, "decoder", counts[1], every)]
    encoder = [_read(w, n, bias) for n, bias in enumerate(biases[0])]
    first = _norm(w, "encoder.final_layer_norm")
    blocks = [_write(w, n, bias) for n, bias in enumerate(biases[1])]
    last = _norm(w, "decoder.final_layer_norm")
    # Files of v1.1 say that the head is not tied; newer ones say what follows from it.
    shrinks = c.flag("scale_decoder_outputs", c.get("tie_word_embeddings") is not False)
    scale = size**-0.5 if scaled and shrinks else None
    head = Head(w, "lm_head", embedding, tied=True, scale=scale)
    start = c.count("decoder_start_token_id", c.count("pad_token_id", 0))
    return EncoderDecoder(w, embedding, encoder, first, blocks, last, head, start_id=start)


def _biases(w: "Checkpoint", stack: str, count: int, every: bool) -> list[RelativeBias]:
    table = "layer.0.SelfAttention.relative_attention_bias"
    names = [f"{stack}.block.{n}.{table}" for n in range(count if every else 1)]
    found = [RelativeBias(w, name, _heads(w), both=stack == "encoder") for name in names]
    return found if every else found * count


def _read(w: "Checkpoint", n: int, bias: RelativeBias) -> EncoderBlock:
    p = f"encoder.block.{n}.layer"
    attention = EncoderAttention(w, *_matrices(w, f"{p}.0.SelfAttention"), scale=1.0, bias=bias)
    return EncoderBlock(
        _norm(w, f"{p}.0.layer_norm"), attention, _norm(w, f"{p}.1.layer_norm"), _mlp(w, f"{p}.1")
    )


def _write(w: "Checkpoint", n: int, bias: RelativeBias) -> CrossBlock:
    p = f"decoder.block.{n}.layer"
    of_self, of_cross = _matrices(w, f"{p}.0.SelfAttention"), _matrices(w, f"{p}.1.EncDecAttention")
    return CrossBlock(
        _norm(w, f"{p}.0.layer_norm"),
        Attention(w, n, *of_self, scale=1.0, relative=bias.behind),
        _norm(w, f"{p}.1.layer_norm"),
        CrossAttention(w, n, *of_cross, scale=1.0),
        _norm(w, f"{p}.2.layer_norm"),
        _mlp(w, f"{p}.2"),
    )


def _heads(w: "Checkpoint") -> Heads:
    count = w.config.integer("num_heads")
    return cut_heads(w, count, count, w.config.integer("d_kv"))


def _matrices(w: "Checkpoint", p: str) -> tuple[Any, ...]:
    qkv = separate(_heads(w), w.config.integer("hidden_size"), f"{p}.q", f"{p}.k", f"{p}.v")
    return _heads(w), qkv, f"{p}.o"


def _norm(w: "Checkpoint", name: str) -> RMSNorm:
    eps = w.config.number("layer_norm_epsilon", 1e-6)
    return rms_norm(w, name, w.config.integer("hidden_size"), eps)


def _mlp(w: "Checkpoint", p: str) -> MLP | GatedMLP:
    c, p = w.config, f"{p}.DenseReluDense"
    act, down = c.text("feed_forward_proj", "relu"), f"{p}.wo"
    sizes: Any = {"hidden": c.integer("hidden_size"), "inner": c.integer("d_ff"), "bias": False}
    if not act.startswith("gated-"):
        return MLP(w, f"{p}.wi", down, act=act, **sizes)
    act = "gelu_new" if act == "gated-gelu" else act.removeprefix("gated-")
    return GatedMLP(w, (f"{p}.wi_0", f"{p}.wi_1"), down, act=act, **sizes)
