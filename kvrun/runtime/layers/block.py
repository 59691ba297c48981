"""Block, Sandwich: attention and MLP on a residual stream, with norms before or on both sides."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvrun.runtime.attention import AttentionSpec
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.layers.attention import Attention
    from kvrun.runtime.layers.mlp import GatedMLP
    from kvrun.runtime.layers.norm import RMSNorm


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        attention_norm: "RMSNorm",
        attention: "Attention",
        mlp_norm: "RMSNorm",
        mlp: "GatedMLP",
    ) -> None:
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp

    @property
    def spec(self) -> "AttentionSpec":
        return self._attention.spec

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        x = self._attention(x, batch, add=x, norm=self._attention_norm)
        return self._mlp(x, batch, add=x, norm=self._mlp_norm)


class Sandwich:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(
        self,
        before_attention: "RMSNorm",
        attention: "Attention",
        after_attention: "RMSNorm",
        before_mlp: "RMSNorm",
        mlp: "GatedMLP",
        after_mlp: "RMSNorm",
    ) -> None:
        self._before_attention = before_attention
        self._attention = attention
        self._after_attention = after_attention
        self._before_mlp = before_mlp
        self._mlp = mlp
        self._after_mlp = after_mlp

    @property
    def spec(self) -> "AttentionSpec":
        return self._attention.spec

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        y = self._attention(x, batch, norm=self._before_attention)
        x = self._after_attention.add_to(x, y)
        y = self._mlp(x, batch, norm=self._before_mlp)
        return self._after_mlp.add_to(x, y)
