"""GPT-J: attention and MLP side by side behind one norm, rotation in pairs. Source: transformers,
models/gptj/modeling_gptj.py."""

from typing import TYPE_CHECKING

from kvrun.runtime.layers.attention import Attention
from kvrun.runtime.layers.block import ParallelBlock
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.embedding import Embedding, Head
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.named import norm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import cut_heads, separate

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    c = w.config
    vocab, hidden = c.integer("vocab_size"), c.integer("hidden_size")
    size = hidden // c.integer("num_attention_heads")
    turned = c.rope(partial=c.integer("rotary_dim", 64) / size)
    rope = Rope(turned, size, w.dtype, w.device, interleaved=True)
    embedding = Embedding(w, "transformer.wte", vocab, hidden)
    blocks = [block(w, n, rope) for n in range(c.integer("num_hidden_layers"))]
    head = Head(w, "lm_head", embedding, tied=False, bias=True)
    return Decoder(w, embedding, blocks, norm(w, "transformer.ln_f"), head)


def block(w: "Checkpoint", n: int, rope: Rope) -> ParallelBlock:
    c, p = w.config, f"transformer.h.{n}"
    count, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    h = cut_heads(w, count, count, hidden // count)
    q, k, v, out = (f"{p}.attn.{x}_proj" for x in ("q", "k", "v", "out"))
    return ParallelBlock(
        norm(w, f"{p}.ln_1"),
        Attention(w, n, h, separate(h, hidden, q, k, v), out, rope=rope),
        MLP(
            w,
            f"{p}.mlp.fc_in",
            f"{p}.mlp.fc_out",
            hidden=hidden,
            inner=c.integer("n_inner", 4 * hidden),
            act=c.text("activation_function", "gelu_new"),
        ),
    )
