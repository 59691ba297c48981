"""Linear: shards, a stored matrix and a bias; sums over ranks where its columns are cut."""

from typing import TYPE_CHECKING, Any, Protocol

import torch

from kvrun.runtime import quant
from kvrun.runtime.checkpoint import Product, Shard
from kvrun.runtime.lora.settle import matrix_of

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.lora.beyond import Change
    from kvrun.runtime.lora.rows import Rows


class Prologue(Protocol):
    """What happens to the input of a product, and its name for products that take it in."""

    def __call__(self, x: torch.Tensor, /) -> torch.Tensor: ...

    @property
    def prologue(self) -> dict[str, Any]: ...


class Epilogue(Protocol):
    """What happens to the output of a product, where that does it itself."""

    @property
    def epilogue(self) -> dict[str, Any]: ...


class Linear:
    """x [tokens, in] -> [tokens, out], plus `add` [tokens, out] (a residual) if given.

    `before` (a norm, a gate) is applied to x first. `add` may be overwritten with the result.
    `gate`, only where `gates` says so, makes the output of [gate | up] what it makes of them.
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
        w.products.append(Product(shards))

    def gates(self, x: torch.Tensor, batch: "Batch") -> bool:
        """Whether the product of a step makes of its gates and ups what the next one wants."""
        # What adapters add to gates and ups comes first.
        return batch.lora is None and not self._partial and self._weight.gates(x.shape[0])

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        before: Prologue | None = None,
        gate: Epilogue | None = None,
    ) -> torch.Tensor:
        if not self._partial and batch.lora is None:
            return product(self._weight, x, add, before, gate=gate)
        assert gate is None
        if not self._partial:
            return self._product(x, batch, add, before)
        y = self._group.all_reduce(self._product(x, batch, None, before))
        if self._late_bias is not None:
            y = y + self._late_bias
        if batch.lora is not None and batch.lora.extra is not None:
            change = batch.lora.extra.at(self._site)
            if change is not None:
                change.finish(y, scaled=False)
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
        if rows.extra is not None and (change := rows.extra.at(self._site)) is not None:
            return self._changed(x, rows, change, add, before)
        if before is not None and not self._both_take_in(before, rows, x):
            x, before = before(x), None  # once for both
        prologue = {} if before is None else before.prologue
        low = rows.shrink(self._site, x, prologue)
        y = product(self._weight, x, add, before)
        if low is not None:
            rows.expand(self._site, low, y, prologue)
        return y

    def _both_take_in(self, before: Prologue, rows: "Rows", x: torch.Tensor) -> bool:
        """Whether adapters' first product and the product itself know what comes before: a norm."""
        # Gates would be made by every program of both.
        norm = "norm" in before.prologue
        return norm and rows.takes_in and self._weight.takes_in(x.shape[0])

    def _changed(
        self,
        x: torch.Tensor,
        rows: "Rows",
        change: "Change",
        add: torch.Tensor | None,
        before: Prologue | None,
    ) -> torch.Tensor:
        """The same where adapters scale, shift or replace what the product gives."""
        if before is not None:
            x = before(x)
        low = rows.shrink(self._site, x, {})
        y = product(self._weight, x)
        if low is not None:
            rows.expand(self._site, low, y, {})
        change.replace(x, y)
        reduce = self._group.all_reduce if self._partial else None
        change.settle(lambda: matrix_of(self._weight, x, self._late_bias, reduce))
        change.finish(y, shifted=not self._partial)
        return y if add is None else y + add


def product(
    weight: "quant.Weight",
    x: torch.Tensor,
    add: torch.Tensor | None = None,
    before: Prologue | None = None,
    out: torch.Tensor | None = None,
    gate: Epilogue | None = None,
) -> torch.Tensor:
    """weight · before(x) + add, in one kernel where the weight takes in what comes before; `gate`
    is for one that gates."""
    behind = {} if gate is None else gate.epilogue
    if before is None:
        return weight.matmul(x, add, out, **behind)
    if weight.takes_in(x.shape[0]):
        return weight.matmul(x, add, out, **before.prologue, **behind)
    return weight.matmul(before(x), add, out, **behind)


def split_rows(w: "Checkpoint", name: str, out_features: int, in_features: int) -> Shard:
    """This rank's even part of a matrix's output rows."""
    return Shard(name, out_features, in_features, rows=(w.group.cut(out_features, name),))


def split_cols(w: "Checkpoint", name: str, out_features: int, in_features: int) -> Shard:
    """This rank's even part of a matrix's input columns."""
    return Shard(name, out_features, in_features, cols=(w.group.cut(in_features, name),))
