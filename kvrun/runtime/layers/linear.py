"""Linear: shards, a stored matrix and a bias; sums over ranks where its columns are cut."""

from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvrun.runtime import quant
from kvrun.runtime.checkpoint import Shard

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint


class Prologue(Protocol):
    """What happens to the input of a product, and its name for products that take it in."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...

    @property
    def prologue(self) -> dict[str, Any]: ...


class Linear:
    """x [tokens, in] -> [tokens, out], plus `add` [tokens, out] (a residual) if given.

    `before` (a norm, a gate) is applied to x first. `add` may be overwritten with the result.
    Adapters find it by the names of its shards, and are cut as they are.
    """

    def __init__(self, w: "Checkpoint", *shards: Shard, bias: bool = False) -> None:
        self._group = w.group
        self._partial = any(shard.cols is not None for shard in shards) and w.group.size > 1
        # The bias belongs to the sum over ranks, not to each part of it.
        last = bias and self._partial
        self._weight = quant.read(w, shards, bias and not last)
        self._late_bias = w.vector(shards[0]) if last else None
        self._site = len(w.products)
        w.products.append(shards)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        before: Prologue | None = None,
    ) -> torch.Tensor:
        if not self._partial:
            if batch.lora is None:
                return product(self._weight, x, add, before)
            return self._product(x, batch, add, before)
        y = self._group.all_reduce(self._product(x, batch, None, before))
        if self._late_bias is not None:
            y = y + self._late_bias
        return y if add is None else y + add

    def _product(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None,
        before: Prologue | None,
    ) -> torch.Tensor:
        rows = batch.lora
        if rows is None:
            return product(self._weight, x, add, before)
        if before is not None and not (rows.takes_in and self._weight.takes_in(x.shape[0])):
            x, before = before(x), None  # once for both
        prologue = {} if before is None else before.prologue
        low = rows.shrink(self._site, x, prologue)
        y = product(self._weight, x, add, before)
        if low is not None:
            rows.expand(self._site, low, y, prologue)
        return y


def product(
    weight: "quant.Weight",
    x: torch.Tensor,
    add: torch.Tensor | None = None,
    before: Prologue | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight · before(x) + add, in one kernel where the weight takes in what comes before."""
    if before is None:
        return weight.matmul(x, add, out)
    if weight.takes_in(x.shape[0]):
        return weight.matmul(x, add, out, **before.prologue)
    return weight.matmul(before(x), add, out)


def split_rows(w: "Checkpoint", name: str, out_features: int, in_features: int) -> Shard:
    """This rank's even part of a matrix's output rows."""
    return Shard(name, out_features, in_features, rows=(w.group.cut(out_features, name),))


def split_cols(w: "Checkpoint", name: str, out_features: int, in_features: int) -> Shard:
    """This rank's even part of a matrix's input columns."""
    return Shard(name, out_features, in_features, cols=(w.group.cut(in_features, name),))
