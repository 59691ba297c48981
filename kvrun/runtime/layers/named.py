"""Parts under the names of Llama's files, which those of most families use, with the sizes that
their configurations call the same."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import AttentionPart, Block, Part
from kvrun.runtime.layers.decoder import Decoder, Layer
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.layers.norm import LayerNorm, Norm, RMSNorm, layer_norm, rms_norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import Heads, cut_heads, separate

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def decoder(
    w: "Checkpoint",
    block: Callable[["Checkpoint", int, Any], Layer],
    *,
    norm: Callable[["Checkpoint", str], Norm] | None = None,
    rope: Any = None,
    embedding_scale: float | None = None,
    final_norm: str = "model.norm",
    made: type[Decoder] = Decoder,
    more: int = 0,
    **head: Any,
) -> Decoder:
    """Embedding, blocks, norm and head; `head` are options of Head, `more` is one of Embedding.

    `rope` is what blocks are handed, that of the configuration where it is None. `made`: what the
    parts become.
    """
    c = w.config
    rope = rope or rotation(w)
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    embedding = Embedding(w, "model.embed_tokens", vocab, hidden, scale=embedding_scale, more=more)
    blocks = [block(w, n, rope) for n in range(c.integer("num_hidden_layers"))]
    last = (norm or rms)(w, final_norm)
    return made(w, embedding, blocks, last, Head(w, "lm_head", embedding, **{"tied": False} | head))


def rotation(w: "Checkpoint", *, theta: float = 10000.0, interleaved: bool = False) -> Rope:
    """Of heads, as the configuration has it; `theta` counts where it says nothing."""
    parameters = w.config.rope(theta=theta)
    return Rope(parameters, heads(w).head_dim, w.dtype, w.device, interleaved=interleaved)


def rotated(w: "Checkpoint", n: int) -> bool:
    """Whether layer n has rotations, in a model where every so many-th has none."""
    c = w.config
    every = c.integer("no_rope_layer_interval", 4)
    usual = [int(i % every != 0) for i in range(1, n + 2)]
    said = c.get("no_rope_layers")  # 1: with rotations; files may say an empty list
    return bool((c.indices("no_rope_layers", usual, n + 1) if said else usual)[n])


def layer(w: "Checkpoint", n: int, attention: AttentionPart, mlp: Part) -> Block:
    """Layer n, with norms before both of its parts."""
    p = f"model.layers.{n}"
    return Block(
        rms(w, f"{p}.input_layernorm"), attention, rms(w, f"{p}.post_attention_layernorm"), mlp
    )


def heads(w: "Checkpoint") -> Heads:
    c = w.config
    count = c.integer("num_attention_heads")
    head_dim = c.integer("head_dim", c.integer("hidden_size") // count)
    return cut_heads(w, count, c.integer("num_key_value_heads", count), head_dim)


def rms(w: "Checkpoint", name: str) -> RMSNorm:
    return rms_norm(w, name, w.config.integer("hidden_size"), w.config.number("rms_norm_eps", 1e-6))


def norm(w: "Checkpoint", name: str) -> LayerNorm:
    """With a bias, and an epsilon as GPT-2's relatives call it."""
    eps = w.config.number("layer_norm_epsilon", 1e-5)
    return layer_norm(w, name, w.config.integer("hidden_size"), eps)


def attention(w: "Checkpoint", n: int, **options: Any) -> Attention:
    """Of layer n; `options` are those of Attention."""
    c, h, p = w.config, heads(w), f"model.layers.{n}.self_attn"
    qkv = separate(h, c.integer("hidden_size"), f"{p}.q_proj", f"{p}.k_proj", f"{p}.v_proj")
    bias = c.flag("attention_bias", False)
    options = {"qkv_bias": bias, "out_bias": bias, "out": f"{p}.o_proj", **options}
    return Attention(w, n, h, qkv, **options)


def mlp(w: "Checkpoint", n: int, *, act: str = "", bias: bool = False) -> GatedMLP:
    """Of layer n."""
    c, p = w.config, f"model.layers.{n}.mlp"
    size, inner = c.integer("hidden_size"), c.integer("intermediate_size")
    gate_up, act = (f"{p}.gate_proj", f"{p}.up_proj"), act or c.text("hidden_act", "silu")
    return GatedMLP(w, gate_up, f"{p}.down_proj", hidden=size, inner=inner, act=act, bias=bias)
