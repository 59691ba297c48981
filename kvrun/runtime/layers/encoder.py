"""Encoder: blocks that see a whole prompt in both directions; what a decoder behind it keeps."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from kvrun.runtime.layers.block import Residual
from kvrun.runtime.layers.cross import CrossDecoder
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.layers.norm import Norm, before_product
from kvrun.runtime.layers.position import RelativeBias

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.layers.qkv import Heads

# Scores held at once.
_SCORES = 1 << 25


class EncoderAttention:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    Every token of a prompt sees all of it; nothing is kept. `qkv` and `out` as in `Attention`.
    """

    def __init__(
        self,
        w: "Checkpoint",
        heads: "Heads",
        qkv: Sequence["Shard"],
        out: str,
        *,
        scale: float,
        bias: RelativeBias,
    ) -> None:
        self._heads = heads
        self._qkv = Linear(w, *qkv)
        back = split_cols(w, out, qkv[0].in_features, heads.heads * heads.head_dim)
        self._out = Linear(w, back)
        self._scale = scale
        self._bias = bias

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        x, before = before_product(norm, x)
        heads, size = self._heads.count, self._heads.head_dim
        qkv = self._qkv(x, batch, before=before).view(-1, 3, heads, size)
        out = qkv.new_empty((len(qkv), heads, size))
        parts = zip(
            qkv.split_with_sizes(batch.query_lens_host),
            out.split_with_sizes(batch.query_lens_host),
            strict=True,
        )
        for part, to in parts:
            self._attend(part.permute(1, 2, 0, 3), to, batch)
        return self._out(out.flatten(1), batch, add)

    def _attend(self, qkv: torch.Tensor, out: torch.Tensor, batch: "Batch") -> None:
        """qkv [3, heads, n, head_dim] of one prompt; out [n, heads, head_dim] is written."""
        q, k, v = qkv[:, None].unbind(0)
        count = len(out)
        step = max(1, _SCORES // (len(qkv[0]) * count))
        for first in range(0, count, step):
            last = min(first + step, count)
            bias = self._bias.among(batch, first, last, count)
            y = F.scaled_dot_product_attention(
                q[:, :, first:last], k, v, attn_mask=bias, scale=self._scale
            )
            out[first:last] = y[0].transpose(0, 1)


class EncoderDecoder(CrossDecoder):
    """A decoder that attends to what an encoder has made of the prompt.

    `encode` reads those in batch.ids. Options are those of Decoder.
    """

    def __init__(
        self,
        w: "Checkpoint",
        embedding: "Callable[[Batch], torch.Tensor]",
        encoder: Sequence[Residual],
        encoder_norm: Norm,
        blocks: Sequence[Residual],
        *decoder: Any,
        start_id: int,
    ) -> None:
        super().__init__(w, embedding, blocks, *decoder)
        self.start_id = start_id
        self.max_position = None  # positions are distances, and far ones are all alike
        self._encoder = encoder
        self._encoder_norm = encoder_norm

    def states_of(self, batch: "Batch") -> torch.Tensor:
        x = self.embed(batch)
        for block in self._encoder:
            x = block(x, batch)
        return self._encoder_norm(x)
