"""JOB: attend over paged keys and values.

A backend is a file of this folder with a class `Attention` that follows `Backend`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from kvrun.runtime.cache.tensors import KVCache
from kvrun.runtime.kernels.rotary import Rotation

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """What one attention layer asks of a backend, and what its cache must hold.

    Key i is visible to query j when 0 <= j - i, and j - i < window, and i // chunk == j // chunk,
    where there is a window or a chunk; unless `causal`, every query sees all keys, and positions
    of queries are the last key's. `softcap` c
    maps a scaled score s to c·tanh(s / c) before masking. `alibi` [heads] adds slope·(i - j) to the
    scaled score. `sinks` [heads] is one more logit per head in the softmax whose value is dropped.
    `latent`: all heads share one key of `head_dim`, and its first `latent` columns are its value.
    `relative` [heads, distances] adds the entry of j - i, or the last one beyond, in fp32.
    """

    layer: int  # index into the cache
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    latent: int | None = None
    relative: torch.Tensor | None = None
    causal: bool = True

    @property
    def row(self) -> int:
        """Values that the cache keeps of a token."""
        return self.head_dim * (2 * self.kv_heads if self.latent is None else 1)

    @property
    def out(self) -> int:
        """Columns that `attend` gives for a token."""
        return self.heads * (self.head_dim if self.latent is None else self.latent)


class Backend(Protocol):
    """Attends over all a sequence has in the cache, this step's keys and values included."""

    cache: KVCache

    def __init__(self, cache: KVCache, dtype: torch.dtype) -> None:
        """`dtype` is that of queries; the cache may hold a smaller one."""

    @staticmethod
    def reject(spec: AttentionSpec, device: torch.device) -> str | None:
        """The reason why this backend cannot serve such a layer, or None when it can."""

    def plan(self, batch: "Batch") -> None:
        """Once a step, before the first layer: whatever all layers share goes to `batch.plan`."""

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: "Batch",
    ) -> torch.Tensor:
        """q [tokens, heads, head_dim] -> [tokens, heads * head_dim], or heads * latent

        k, v [tokens, kv_heads, head_dim] are what this step has stored in the cache already.
        Inputs may be strided views of one buffer.
        """

    def attend_new(
        self, spec: AttentionSpec, qkv: torch.Tensor, rotation: Rotation, batch: "Batch"
    ) -> torch.Tensor | None:
        """`attend` on heads that are neither rotated nor stored yet, which it does as well.

        qkv [tokens, heads + 2 * kv_heads, head_dim] is not to be read afterwards. None, and
        nothing done: this backend has no kernel that does all of it for such a layer or step.
        """
