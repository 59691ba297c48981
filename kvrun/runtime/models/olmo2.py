"""OLMo 2: norms behind attention and MLP, and one norm over all queries and one over all keys.
Source: transformers, models/olmo2/modeling_olmo2.py."""

from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.layers.block import Sandwich
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.models import llama

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> Decoder:
    w.config.defaults(rms_norm_eps=1e-5)
    return llama.decoder(w, block)


def block(w: "Checkpoint", n: int, rope: Rope, window: int | None = None) -> Sandwich:
    p = f"model.layers.{n}"
    return Sandwich(
        None,
        llama.attention(w, n, rope=rope, window=window, head_norm=WholeNorm(w, n)),
        llama.rms(w, f"{p}.post_attention_layernorm"),
        None,
        llama.mlp(w, n),
        llama.rms(w, f"{p}.post_feedforward_layernorm"),
    )


class WholeNorm:
    """RMSNorm over all queries of a token and over all its keys, also those of other ranks."""

    def __init__(self, w: "Checkpoint", n: int) -> None:
        h, p = llama.heads(w), f"model.layers.{n}.self_attn"
        self._group = w.group
        self._eps = w.config.number("rms_norm_eps", 1e-5)
        self._sides = []
        for name, count, mine in (("q_norm", h.heads, h.mine), ("k_norm", h.kv_heads, h.mine_kv)):
            size = count * h.head_dim
            weight = w.read(f"{p}.{name}.weight", (size,), (h.scaled(mine),), torch.float32)
            # A head that several ranks keep counts once in the sum over them.
            copies = (mine[1] - mine[0]) * w.group.size / count
            self._sides.append((mine[1] - mine[0], weight.view(-1, h.head_dim), size * copies))

    def __call__(self, qk: torch.Tensor, batch: Any) -> None:
        """Normalise qk [tokens, heads + kv_heads, head_dim] in place."""
        first = 0
        for count, weight, size in self._sides:
            part = qk[:, first : first + count]
            wide = part.float()
            squares = self._group.all_reduce(wide.square().sum((1, 2), keepdim=True))
            part.copy_(wide.mul_(torch.rsqrt(squares / size + self._eps)).mul_(weight))
            first += count
