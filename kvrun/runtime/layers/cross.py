"""Cross-attention: a decoder's rows attend to what an encoder has made of a prompt, or eyes of an
image."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.layers.block import Block, Part, Residual
from kvrun.runtime.layers.decoder import Decoder, Layer
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.layers.norm import Norm, RMSNorm, before_product

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.cache.states import StateSpec
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.layers.qkv import Heads


class CrossAttention:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    Keys and values lie in the cache as those of the self-attention of the same `layer` do, in
    blocks of their own. A row sees all of its source; what attention gives is zero for rows that
    have none. `norms` over each head of queries and of keys, [head_dim].
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
        norms: Sequence[RMSNorm] | None = None,
    ) -> None:
        h = heads
        self._spec = AttentionSpec(layer, h.count, h.kv_count, h.head_dim, scale, causal=False)
        self._q = Linear(w, qkv[0])
        self._kv = Linear(w, *qkv[1:])
        self._out = Linear(w, split_cols(w, out, qkv[0].in_features, h.heads * h.head_dim))
        self._q_norm = None if norms is None else norms[0]
        self._k_norm = None if norms is None else norms[1]

    def remember(self, states: torch.Tensor, batch: "Batch") -> None:
        """Put the keys and values of a source's states [tokens, wide] into the cache."""
        spec = self._spec
        kv = self._kv(states, batch).view(-1, 2 * spec.kv_heads, spec.head_dim)
        if self._k_norm is not None:
            keys = kv[:, : spec.kv_heads]
            keys.copy_(_by_head(self._k_norm, keys))
        batch.backend.cache.store(spec.layer, batch.slot_mapping, kv)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        if batch.source is None:
            return torch.zeros_like(x) if add is None else add
        x, before = before_product(norm, x)
        spec, rows = self._spec, batch.source_rows
        q = self._q(x, batch, before=before).view(-1, spec.heads, spec.head_dim)
        seeing = q if rows is None else q.index_select(0, rows)
        if self._q_norm is not None:
            seeing = _by_head(self._q_norm, seeing)
        # What this step has stored is read from the cache, not handed over.
        y = batch.backend.attend(spec, seeing, seeing, seeing, batch.source)
        if rows is not None:
            y = y.new_zeros((len(q), y.shape[1])).index_copy_(0, rows, y)
        return self._out(y, batch, add)


def _by_head(norm: RMSNorm, x: torch.Tensor) -> torch.Tensor:
    # Kernels norm rows, of two dimensions.
    return norm(x.reshape(-1, x.shape[-1])).view(x.shape)


class GatedCrossBlock:
    """x + tanh(gate)·cross(norm(x)), x + tanh(gate)·mlp(norm(x)), then a block behind both.

    `gates` [1] or [hidden] of either. Source: Flamingo, https://arxiv.org/abs/2204.14198
    """

    def __init__(
        self,
        cross_norm: Norm,
        cross: CrossAttention,
        mlp_norm: Norm,
        mlp: Part,
        gates: tuple[torch.Tensor, torch.Tensor],
        block: Block,
    ) -> None:
        self._cross_norm = cross_norm
        self.cross = cross
        self._mlp_norm = mlp_norm
        self._mlp = mlp
        self._cross_gate, self._mlp_gate = (gate.tanh() for gate in gates)
        self._block = block

    @property
    def spec(self) -> "AttentionSpec | StateSpec":
        return self._block.spec

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        if batch.source is not None:
            y = self.cross(x, batch, norm=self._cross_norm)
            x = torch.addcmul(x, y, self._cross_gate)
        y = self._mlp(x, batch, norm=self._mlp_norm)
        return self._block(torch.addcmul(x, y, self._mlp_gate), batch)


def gates(
    w: "Checkpoint", cross: str, mlp: str, *, vector: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of attention and of the MLP behind it; `vector`: one for each value of a row."""
    shape = (1, 1, w.config.integer("hidden_size")) if vector else (1,)
    return w.read(cross, shape).flatten(), w.read(mlp, shape).flatten()


class CrossDecoder(Decoder):
    """A decoder some of whose blocks attend to sources beside its own tokens.

    `encode` reads sources, once; a step's `batch.source` then says where its rows find theirs.
    Options are those of Decoder.
    """

    def __init__(
        self,
        w: "Checkpoint",
        embedding: "Callable[[Batch], torch.Tensor]",
        blocks: Sequence[Layer],
        *decoder: Any,
    ) -> None:
        super().__init__(w, embedding, blocks, *decoder)
        self._crossing = [cross for block in blocks for cross in _crossing(block)]

    def encode(self, batch: "Batch") -> None:
        """Put the keys and values of the sources in a batch, each whole, into the cache at
        batch.slot_mapping, for every layer that attends to them."""
        states = self.states_of(batch)
        for cross in self._crossing:
            cross.remember(states, batch)

    def states_of(self, batch: "Batch") -> torch.Tensor:
        """What is attended to, [tokens, wide]: the features of images, batch.image_states."""
        assert batch.image_states is not None
        return batch.image_states


def _crossing(block: Layer) -> list[CrossAttention]:
    if isinstance(block, GatedCrossBlock):
        return [block.cross]
    parts = block.parts if isinstance(block, Residual) else []
    return [part for _, part in parts if isinstance(part, CrossAttention)]
