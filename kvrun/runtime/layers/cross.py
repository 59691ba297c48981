"""Cross-attention: a decoder's rows attend to what an encoder has made of the prompt."""

from typing import TYPE_CHECKING

import torch

from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.layers.block import AttentionPart, Part
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.layers.norm import Norm, before_product

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.cache.states import StateSpec
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.layers.qkv import Heads


class CrossAttention:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    Keys and values lie in the cache as those of the self-attention of the same `layer` do, in
    blocks of their own. A row sees all of its prompt, as the last token of a sequence would: so
    every row of `batch.source` is a sequence with one query.
    """

    def __init__(
        self,
        w: "Checkpoint",
        layer: int,
        heads: "Heads",
        qkv: "list[Shard]",
        out: str,
        *,
        scale: float,
    ) -> None:
        h = heads
        self._spec = AttentionSpec(layer, h.count, h.kv_count, h.head_dim, scale)
        self._q = Linear(w, qkv[0])
        self._kv = Linear(w, *qkv[1:])
        self._out = Linear(w, split_cols(w, out, qkv[0].in_features, h.heads * h.head_dim))

    def remember(self, states: torch.Tensor, batch: "Batch") -> None:
        """Put the keys and values of an encoder's states [tokens, hidden] into the cache."""
        spec = self._spec
        kv = self._kv(states, batch).view(-1, 2 * spec.kv_heads, spec.head_dim)
        batch.backend.cache.store(spec.layer, batch.slot_mapping, kv)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        assert batch.source is not None
        x, before = before_product(norm, x)
        spec = self._spec
        q = self._q(x, batch, before=before).view(-1, spec.heads, spec.head_dim)
        # One query a sequence: what this step has stored is read from the cache, not handed over.
        y = batch.backend.attend(spec, q, q, q, batch.source)
        return self._out(y, batch, add)


class CrossBlock:
    """x + attention(norm(x)), x + cross(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        attention_norm: Norm,
        attention: AttentionPart,
        cross_norm: Norm,
        cross: CrossAttention,
        mlp_norm: Norm,
        mlp: Part,
    ) -> None:
        self._attention_norm = attention_norm
        self._attention = attention
        self._cross_norm = cross_norm
        self._cross = cross
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    @property
    def spec(self) -> "AttentionSpec | StateSpec":
        return self._attention.spec

    def remember(self, states: torch.Tensor, batch: "Batch") -> None:
        """Keep the keys and values of an encoder's states."""
        self._cross.remember(states, batch)

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        x = self._attention(x, batch, add=x, norm=self._attention_norm)
        x = self._cross(x, batch, add=x, norm=self._cross_norm)
        return self._mlp(x, batch, add=x, norm=self._mlp_norm)
