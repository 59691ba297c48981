"""JOB: attend over paged keys and values.

A backend is a file of this folder with a class `Attention` that follows `Backend`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """What one attention layer asks of a backend, and what its cache must hold.

    Key i is visible to query j when 0 <= j - i (and j - i < window, if there is one). `softcap` c
    maps a scaled score s to c·tanh(s / c) before masking. `alibi` [heads] adds slope·(i - j) to the
    scaled score. `sinks` [heads] is one more logit per head in the softmax whose value is dropped.
    """

    layer: int  # index into the cache
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    alibi: torch.Tensor | None = None
    sinks: torch.Tensor | None = None


class Backend(Protocol):
    """Writes new keys and values into their slots, then attends over all a sequence has."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the cache of every layer in this backend's own layout."""

    @staticmethod
    def reject(spec: AttentionSpec, device: torch.device) -> str | None:
        """The reason why this backend cannot serve such a layer, or None when it can."""

    def plan(self, batch: "Batch") -> None:
        """Once a step, before the first layer: whatever all layers share goes to `batch.plan`."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Make the content of blocks finite again: masked keys weigh 0, but 0 · NaN is NaN."""

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: "Batch",
    ) -> torch.Tensor:
        """Store k, v [tokens, kv_heads, head_dim], attend q [tokens, heads, head_dim].

        Returns [tokens, heads * head_dim]. Inputs may be strided views of one buffer.
        """
