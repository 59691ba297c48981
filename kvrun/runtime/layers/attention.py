"""Attention: project, normalise, rotate, attend over the cache, project back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.device import fused
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.layers.norm import HeadNorm, Norm, before_product

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.layers.position import Rope
    from kvrun.runtime.layers.qkv import Heads


class QKNorm(Protocol):
    """What happens to queries and keys before they are rotated."""

    def __call__(self, qk: torch.Tensor, batch: "Batch") -> None:
        """Normalise qk [tokens, heads + kv_heads, head_dim] in place."""


class Attention:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    `qkv` are the shards whose rows are this rank's [q; k; v], `out` names the matrix
    [hidden, heads * head_dim], stored as those are. The default scale is 1 / sqrt(head_dim).
    `clip` bounds what is projected. `alibi` and `sinks` [heads] are those of the whole model,
    `relative` [heads, distances] those of this rank, on which layers that share it depend.
    """

    def __init__(
        self,
        w: "Checkpoint",
        layer: int,
        heads: "Heads",
        qkv: Sequence["Shard"],
        out: str,
        *,
        qkv_bias: bool = False,
        out_bias: bool = False,
        rope: "Rope | None" = None,
        head_norm: QKNorm | None = None,
        clip: float | None = None,
        scale: float | None = None,
        window: int | None = None,
        chunk: int | None = None,
        softcap: float | None = None,
        alibi: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        relative: torch.Tensor | None = None,
    ) -> None:
        mine = slice(*heads.mine)
        self.spec = AttentionSpec(
            layer,
            heads.count,
            heads.kv_count,
            heads.head_dim,
            heads.head_dim**-0.5 if scale is None else scale,
            window=window,
            chunk=chunk,
            softcap=softcap,
            alibi=None if alibi is None else alibi[mine],
            sinks=None if sinks is None else sinks[mine],
            relative=relative,
        )
        self._qkv = Linear(w, *qkv, bias=qkv_bias)
        back = split_cols(w, out, qkv[0].in_features, heads.heads * heads.head_dim)
        self._out = Linear(w, replace(back, transposed=qkv[0].transposed), bias=out_bias)
        self._clip = clip
        self._rope = rope
        self._head_norm = head_norm
        self._kernel = fused("rotary", w.device)
        norm = head_norm if isinstance(head_norm, HeadNorm) else None
        self._rotation = Rotation(interleaved=rope is not None and rope.interleaved)
        if norm is not None:
            self._rotation = self._rotation._replace(q_weight=norm.q, k_weight=norm.k, eps=norm.eps)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        spec = self.spec
        x, before = before_product(norm, x)
        queries, rotated = spec.heads, spec.heads + spec.kv_heads
        # One buffer [q; k; v]: what follows works on views of it, in place.
        heads = self._qkv(x, batch, before=before).view(-1, rotated + spec.kv_heads, spec.head_dim)
        if self._clip is not None:
            heads.clamp_(-self._clip, self._clip)
        whole = self._kernel is not None
        # The kernel knows HeadNorm only.
        if self._head_norm is not None and not (whole and isinstance(self._head_norm, HeadNorm)):
            self._head_norm(heads.narrow(1, 0, rotated), batch)
        if whole:
            y = self._rotate_and_attend(heads, batch)
        else:
            if self._rope is not None:
                self._rope(heads.narrow(1, 0, rotated), batch)
            kv = heads.narrow(1, queries, 2 * spec.kv_heads)
            batch.backend.cache.store(spec.layer, batch.slot_mapping, kv)
            q, k, v = self._split(heads)
            y = batch.backend.attend(spec, q, k, v, batch)
        return self._out(y, batch, add)

    def _rotate_and_attend(self, heads: torch.Tensor, batch: "Batch") -> torch.Tensor:
        """Norms, rotation and the cache's new rows by one kernel, or attention with them."""
        assert self._kernel is not None
        spec, backend, rotation = self.spec, batch.backend, self._rotation
        if self._rope is not None:
            cos, sin = self._rope.angles(batch)
            rotation = rotation._replace(cos=cos, sin=sin)
        y = backend.attend_new(spec, heads, rotation, batch)
        if y is None:
            self._kernel.rotate_append(
                heads.view(len(heads), -1),
                rotation,
                backend.cache.rows(spec.layer),
                batch.slot_mapping,
                spec.kv_heads,
                spec.head_dim,
            )
            y = backend.attend(spec, *self._split(heads), batch)
        return y

    def _split(self, heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v as views."""
        kv_heads = self.spec.kv_heads
        q, k, v = heads.split_with_sizes((self.spec.heads, kv_heads, kv_heads), 1)
        return q, k, v
