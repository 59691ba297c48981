"""RMSNorm and LayerNorm, over a row or over each head of queries and keys."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F

from kvrun.runtime.checkpoint import Product, Shard
from kvrun.runtime.device import fused

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.layers.linear import Prologue
    from kvrun.runtime.layers.qkv import Heads
    from kvrun.runtime.lora.beyond import NormChange


class Norm(Protocol):
    """A norm over the last dimension."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype, written to `out` (x itself, say) if given."""

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + norm(x), written to `residual`."""


class Changed:
    """A norm with other weights for some rows: their adapters'."""

    def __init__(self, norm: "RMSNorm | LayerNorm", changes: "Sequence[NormChange]") -> None:
        self._norm = norm
        self._changes = changes

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y = self._norm(x)
        for rows, weight, bias in self._changes:
            if rows.dtype is torch.bool:  # which ones only the device knows
                y = torch.where(rows, self._norm.with_weights(x, weight, bias), y)
            else:
                y.index_copy_(0, rows, self._norm.with_weights(x[rows], weight, bias))
        return y if out is None else out.copy_(y)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual.add_(self(x))


def adapted(norm: Norm, batch: "Batch", rows: torch.Tensor | None = None) -> Norm:
    """What a norm is for a step; `rows` are those of its input, where these are not all."""
    if batch.lora is None or batch.lora.extra is None:
        return norm
    if not isinstance(norm, RMSNorm | LayerNorm) or norm.site is None:
        return norm
    changes = batch.lora.extra.norms(norm.site, rows)
    return Changed(norm, changes) if changes else norm


def let_adapt(w: "Checkpoint", norms: "Iterable[Norm | None]") -> None:
    """Let adapters find norms by their names. Who calls these must ask `adapted` for them."""
    for norm in norms:
        if isinstance(norm, RMSNorm | LayerNorm) and norm.name and norm.site is None:
            norm.site = len(w.products)
            shard = Shard(norm.name, norm.weight.shape[-1], 1)
            w.products.append(Product((shard,), "norm" if norm.bias is not None else "gain"))


def before_product(norm: Norm | None, x: torch.Tensor) -> tuple[torch.Tensor, "Prologue | None"]:
    """What a product is given as its x and its `before`: it may take in an RMSNorm, others are
    applied ahead of it."""
    if norm is None or isinstance(norm, RMSNorm):
        return x, norm
    return norm(x), None


def add_before_part(
    after: Norm, residual: torch.Tensor, x: torch.Tensor, norm: Norm | None
) -> tuple[torch.Tensor, Norm | None]:
    """residual + after(x), written to `residual`. What the next part is given as its x and its
    `norm`: that sum and `norm`, or, where one kernel does it all, norm(sum) and None."""
    if isinstance(after, RMSNorm) and isinstance(norm, RMSNorm) and after._kernel is not None:
        args = after.weight, after.eps, residual, norm.weight, norm.eps
        return after._kernel.norm_add_norm(x, *args), None
    return after.add_to(residual, x), norm


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32.

    Source: Zhang & Sennrich 2019. `weight` broadcasts against x; it is [size], or [heads, size].
    """

    bias = None
    site: int | None = None  # among the products that adapters can change

    def __init__(
        self, weight: torch.Tensor, eps: float, *, name: str = "", offset: float = 0.0
    ) -> None:
        # With n = |x| the divisor is sqrt(n² + size·eps) / sqrt(size): two small operators on one
        # value per row, and sqrt(size) moves into the weight. Torch's own rms_norm takes twice
        # the time on CPU.
        size = weight.shape[-1]
        self.weight = weight
        self.eps = eps
        self.name, self._offset = name, offset
        self._weight = weight * size**0.5
        self._floor = torch.full((1,), (size * eps) ** 0.5, device=weight.device)
        self._kernel = fused("norm", weight.device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype, written to `out` (x itself, say) if given."""
        if self._kernel is not None:
            return cast(torch.Tensor, self._kernel.rms_norm(x, self.weight, self.eps, out=out))
        norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        y: torch.Tensor = x / norm.hypot_(self._floor)
        if out is None:
            if x.dtype is torch.float32:
                return y.mul_(self._weight)
            out = torch.empty_like(x)
        return torch.mul(y, self._weight, out=out)

    def with_weights(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The same with another weight, as files have it; fp32."""
        return self(x) if weight is None else RMSNorm(weight + self._offset, self.eps)(x)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """residual + norm(x), written to `residual`."""
        if self._kernel is not None:
            y = self._kernel.norm_add(x, self.weight, self.eps, residual)
            return cast(torch.Tensor, y)
        return residual.add_(self(x))

    @property
    def prologue(self) -> dict[str, Any]:
        """How a product that takes in the norm of its input is asked for it."""
        return {"norm": self.weight, "eps": self.eps}


def rms_norm(w: "Checkpoint", name: str, size: int, eps: float, *, offset: float = 0.0) -> RMSNorm:
    """A norm over rows; `offset` is 1 in families that store their weight minus one."""
    weight = w.read(f"{name}.weight", (size,), dtype=torch.float32) + offset
    return RMSNorm(weight, eps, name=name, offset=offset)


class LayerNorm:
    """(x - mean) / sqrt(variance + eps) · weight + bias over the last dimension.

    weight, bias: [size] in the model's dtype; without a bias nothing is added.
    """

    site: int | None = None  # among the products that adapters can change

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        eps: float,
        *,
        name: str = "",
        offset: float = 0.0,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self._eps = eps
        self.name, self._offset = name, offset

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y = F.layer_norm(x, self.weight.shape, self.weight, self.bias, self._eps)
        return y if out is None else out.copy_(y)

    def with_weights(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The same with another weight, as files have it, or bias; fp32."""
        own = self.weight if weight is None else (weight + self._offset).to(x.dtype)
        shift = self.bias if bias is None else bias.to(x.dtype)
        return F.layer_norm(x, own.shape, own, shift, self._eps)

    def add_to(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual.add_(self(x))


def layer_norm(
    w: "Checkpoint", name: str, size: int, eps: float, *, bias: bool = True, offset: float = 0.0
) -> LayerNorm:
    """A LayerNorm over rows; `offset` is 1 in families that store their weight minus one."""
    weight = w.read(f"{name}.weight", (size,))
    return LayerNorm(
        weight + offset if offset else weight,
        w.read(f"{name}.bias", (size,)) if bias else None,
        eps,
        name=name,
        offset=offset,
    )


class HeadNorm:
    """RMSNorm over each head of [q; k]: one weight for all query heads, one for all key heads.

    q, k: names of weights [head_dim]; `offset` is 1 in families that store them minus one.
    """

    def __init__(
        self, w: "Checkpoint", q: str, k: str, h: "Heads", eps: float, *, offset: float = 0.0
    ) -> None:
        self.q, self.k = (
            w.read(f"{name}.weight", (h.head_dim,), dtype=torch.float32) + offset for name in (q, k)
        )
        self.eps = eps
        rows = [self.q.expand(h.count, -1), self.k.expand(h.kv_count, -1)]
        self._norm = RMSNorm(torch.cat(rows), eps)

    def __call__(self, qk: torch.Tensor, batch: "Batch") -> None:
        """Normalise qk [tokens, heads + kv_heads, head_dim] in place."""
        self._norm(qk, out=qk)


class UnitNorm(HeadNorm):
    """Without weights, so that it may come before the rotation as well as behind it."""

    def __init__(self, head_dim: int, eps: float, device: torch.device) -> None:
        self.q = self.k = torch.ones(head_dim, device=device)
        self.eps = eps
        self._norm = RMSNorm(self.q, eps)


class HeadLayerNorm:
    """LayerNorm over each head of [q; k], with a weight of its own for every head.

    weight, bias: [heads + kv_heads, head_dim] of this rank; without a bias nothing is added.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> None:
        self._weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, qk: torch.Tensor, batch: "Batch") -> None:
        """Normalise qk [tokens, heads + kv_heads, head_dim] in place."""
        y = F.layer_norm(qk.float(), qk.shape[-1:], eps=self._eps).mul_(self._weight)
        qk.copy_(y if self._bias is None else y.add_(self._bias))


class WholeNorm:
    """RMSNorm over all queries of a token and over all its keys, also those of other ranks.

    q, k: names of weights [heads * head_dim] and [kv_heads * head_dim].
    """

    def __init__(self, w: "Checkpoint", q: str, k: str, h: "Heads", eps: float) -> None:
        self._group = w.group
        self._eps = eps
        self._sides = []
        for name, total, mine in ((q, h.heads, h.mine), (k, h.kv_heads, h.mine_kv)):
            size, count = total * h.head_dim, mine[1] - mine[0]
            weight = w.read(f"{name}.weight", (size,), (h.scaled(mine),), torch.float32)
            # A head that several ranks keep counts once for each in the sum over them.
            copies = count * w.group.size / total
            self._sides.append((count, weight.view(-1, h.head_dim), size * copies))

    def __call__(self, qk: torch.Tensor, batch: "Batch") -> None:
        """Normalise qk [tokens, heads + kv_heads, head_dim] in place."""
        first = 0
        for count, weight, size in self._sides:
            part = qk[:, first : first + count]
            wide = part.float()
            squares = self._group.all_reduce(wide.square().sum((1, 2), keepdim=True))
            part.copy_(wide.mul_(torch.rsqrt(squares / size + self._eps)).mul_(weight))
            first += count
