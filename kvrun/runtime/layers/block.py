"""Blocks: attention and MLP on a residual stream, one after the other or side by side, with norms
before them, behind them or both."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch

from kvrun.runtime.layers.norm import adapted, add_before_part

if TYPE_CHECKING:
    from kvrun.runtime.attention import AttentionSpec
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.cache.states import StateSpec
    from kvrun.runtime.layers.norm import Norm


class Part(Protocol):
    """An MLP, dense or of experts."""

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: "Norm | None" = None,
    ) -> torch.Tensor:
        """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; it may be overwritten with
        the result. `norm` is applied to x first."""


class AttentionPart(Part, Protocol):
    """Attention or what stands in its place, which also says what it asks of the cache."""

    @property
    def spec(self) -> "AttentionSpec | StateSpec": ...


class Block:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self, attention_norm: "Norm", attention: AttentionPart, mlp_norm: "Norm", mlp: Part
    ) -> None:
        self._attention_norm = attention_norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp
        self.norms = attention_norm, mlp_norm  # that adapters may change

    @property
    def spec(self) -> "AttentionSpec | StateSpec":
        return self._attention.spec

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        x = self._attention(x, batch, add=x, norm=adapted(self._attention_norm, batch))
        return self._mlp(x, batch, add=x, norm=adapted(self._mlp_norm, batch))


class Residual:
    """x + part(norm(x)) for one part after the other; where it asks of a cache, the first does."""

    def __init__(self, parts: "Sequence[tuple[Norm, Part]]") -> None:
        self.parts = parts

    @property
    def spec(self) -> "AttentionSpec | StateSpec":
        return cast(AttentionPart, self.parts[0][1]).spec

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        for norm, part in self.parts:
            x = part(x, batch, add=x, norm=norm)
        return x


class PostBlock(Block):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        x = adapted(self._attention_norm, batch)(self._attention(x, batch, add=x))
        return adapted(self._mlp_norm, batch)(self._mlp(x, batch, add=x))


class ParallelBlock:
    """x + attention(norm(x)) + mlp(norm(x)), with one norm for both or one each."""

    def __init__(
        self, norm: "Norm", attention: AttentionPart, mlp: Part, mlp_norm: "Norm | None" = None
    ) -> None:
        self._norm = norm
        self._attention = attention
        self._mlp_norm = mlp_norm
        self._mlp = mlp
        self.norms = norm, mlp_norm

    @property
    def spec(self) -> "AttentionSpec | StateSpec":
        return self._attention.spec

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        y = adapted(self._norm, batch)(x)
        # Before x is overwritten.
        z = y if self._mlp_norm is None else adapted(self._mlp_norm, batch)(x)
        return self._mlp(z, batch, add=self._attention(y, batch, add=x))


class Sandwich:
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))); a norm before may be None."""

    def __init__(
        self,
        before_attention: "Norm | None",
        attention: AttentionPart,
        after_attention: "Norm",
        before_mlp: "Norm | None",
        mlp: Part,
        after_mlp: "Norm",
    ) -> None:
        self._before_attention = before_attention
        self._attention = attention
        self._after_attention = after_attention
        self._before_mlp = before_mlp
        self._mlp = mlp
        self._after_mlp = after_mlp
        self.norms = before_attention, after_attention, before_mlp, after_mlp

    @property
    def spec(self) -> "AttentionSpec | StateSpec":
        return self._attention.spec

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        before = self._before_attention
        y = self._attention(x, batch, norm=before and adapted(before, batch))
        before = self._before_mlp
        before = before and adapted(before, batch)
        y, norm = add_before_part(adapted(self._after_attention, batch), x, y, before)
        y = self._mlp(y, batch, norm=norm)
        return adapted(self._after_mlp, batch).add_to(x, y)


class Scaled:
    """A part whose result counts `factor` times in the residual stream."""

    def __init__(self, part: Part, factor: float) -> None:
        self._part = part
        self._factor = factor

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: "Norm | None" = None,
    ) -> torch.Tensor:
        y = self._part(x, batch, norm=norm)
        return y * self._factor if add is None else add.add_(y, alpha=self._factor)


class ScaledAttention(Scaled):
    """The same of attention."""

    def __init__(self, part: AttentionPart, factor: float) -> None:
        super().__init__(part, factor)
        self.spec = part.spec
