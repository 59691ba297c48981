"""MoE: a router chooses a few gated MLPs for each token; what they give is weighed and added up."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvrun.runtime import quant
from kvrun.runtime.checkpoint import Product
from kvrun.runtime.device import kernel
from kvrun.runtime.kernels import moe
from kvrun.runtime.kernels.moe import More, Stack
from kvrun.runtime.kernels.w4a16 import Coded
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.layers.mlp import KERNEL_NAMES, gate_and_up
from kvrun.runtime.layers.qkv import Shard

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.layers.block import Part
    from kvrun.runtime.layers.norm import Norm

# A router's logits [tokens, experts] fp32 -> weights [tokens, K] fp32 and experts [tokens, K].
Route = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# What an adapter adds to the products with gate_up and down.
Changes = tuple[More | None, More | None] | None


def softmax_top(count: int, *, normalise: float = 0.0) -> Route:
    """The `count` likeliest experts; `normalise` p: their chances are divided by their p-norm."""

    def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = logits.softmax(-1).topk(count)
        if normalise:
            weights = weights / torch.linalg.vector_norm(weights, normalise, -1, keepdim=True)
        return weights, chosen

    return route


def top_softmax(count: int) -> Route:
    """The `count` largest logits; weights are a softmax of these alone."""

    def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, chosen = logits.topk(count)
        return weights.softmax(-1), chosen

    return route


def sigmoid_of_best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The Route to the likeliest expert, with the sigmoid of its logit."""
    best, chosen = logits.max(-1, keepdim=True)
    return best.sigmoid(), chosen


def in_best_groups(scores: torch.Tensor, groups: int, kept: int, best: int) -> torch.Tensor:
    """Scores [tokens, experts], with -inf outside the `kept` groups of experts whose `best` best
    add up to most."""
    if groups == kept:
        return scores
    grouped = scores.view(len(scores), groups, -1)
    ranks = grouped.topk(best, dim=-1)[0].sum(-1).topk(kept, dim=-1)[1]
    hidden = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter_(1, ranks, False)
    return grouped.masked_fill(hidden.unsqueeze(-1), float("-inf")).flatten(1)


def sigmoid_top(
    count: int,
    bias: torch.Tensor,
    *,
    groups: int = 1,
    kept: int = 1,
    normalise: bool = True,
    factor: float = 1.0,
) -> Route:
    """The `count` best by sigmoid and `bias` [experts], of the best groups; the bias takes part in
    the choice, not in the weights."""

    def route(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = logits.sigmoid()
        chosen = in_best_groups(scores + bias, groups, kept, best=2).topk(count, dim=-1)[1]
        weights = scores.gather(1, chosen)
        if normalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * factor, chosen

    return route


@dataclass(frozen=True)
class Experts:
    """Matrices of this rank: gate_up [experts, 2 * inner, hidden], the gates on top, down
    [experts, hidden, inner]; biases [experts, ...] if any.

    `act` is an activation of a gated MLP, or "clamped" with a `limit` (see kernels/moe.py).
    `sites`: the two among the products that adapters can change; None: they cannot.
    """

    gate_up: Stack
    down: Stack
    act: str
    count: int
    hidden: int
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    limit: float = 0.0
    sites: tuple[int, int] | None = None


def listed(
    w: "Checkpoint",
    name: str,
    parts: tuple[str, str, str],
    *,
    count: int,
    hidden: int,
    inner: int,
    act: str,
) -> Experts:
    """Experts with tensors of their own: `name`.N.part, for a gate, an up and a down matrix."""
    gate, up, down = parts
    rows = [
        gate_and_up(w, (f"{name}.{n}.{gate}", f"{name}.{n}.{up}"), hidden, inner)
        for n in range(count)
    ]
    cols = [[split_cols(w, f"{name}.{n}.{down}", hidden, inner)] for n in range(count)]
    stacks = quant.experts(w, rows), quant.experts(w, cols)
    first, last = w.group.cut(inner, name)
    halves = (first, last), (inner + first, inner + last)
    both = Shard(f"{name}.gate_up_proj", 2 * inner, hidden, halves)
    back = Shard(f"{name}.down_proj", hidden, inner, None, ((first, last),))
    sites = _adaptable(w, count, both, back, (gate, up), (down,))
    return Experts(*stacks, act, count, hidden, sites=sites)


def _adaptable(
    w: "Checkpoint",
    count: int,
    both: Shard,
    back: Shard,
    halves: tuple[str, ...] = (),
    whole: tuple[str, ...] = (),
) -> tuple[int, int]:
    """Let adapters find experts by these names; the two places."""
    for shard, parts in ((both, halves), (back, whole)):
        known = replace(shard, name=shard.name.removesuffix(".weight"))
        w.products.append(Product((known,), "experts", count, parts))
    return len(w.products) - 2, len(w.products) - 1


def stacked(
    w: "Checkpoint",
    gate_up: str,
    down: str,
    *,
    count: int,
    hidden: int,
    inner: int,
    act: str,
    transposed: bool = False,
    alternate: bool = False,
) -> Experts:
    """Experts in two tensors [count, 2 * inner, hidden] and [count, hidden, inner]; `transposed`:
    their last two dimensions are exchanged; `alternate`: a gate, an up, and so on."""
    first, last = w.group.cut(inner, gate_up)
    halves = (first, last), (inner + first, inner + last)
    rows = ((2 * first, 2 * last),) if alternate else halves
    both = Shard(gate_up, 2 * inner, hidden, rows, None, transposed)
    back = Shard(down, hidden, inner, None, ((first, last),), transposed)
    stacks = quant.stack(w, count, both, alternate=alternate), quant.stack(w, count, back)
    if alternate:  # here the gates come first
        both = replace(both, rows=tuple((n, n + 1) for k in (0, 1) for n in range(*rows[0])[k::2]))
    sites = _adaptable(w, count, both, back)
    return Experts(*stacks, act, count, hidden, sites=sites)


def made(
    w: "Checkpoint", name: str, shape: tuple[int, int, int], one: Callable[[int], torch.Tensor]
) -> Stack:
    """Matrices [experts, out, in] of this rank, each [out, in] as `one` reads it plainly."""
    return quant.made(w, name, shape[0], shape[1:], one)


def flat(
    w: "Checkpoint",
    name: str,
    parts: tuple[str, str, str],
    *,
    count: int,
    hidden: int,
    inner: int,
    act: str,
) -> Experts:
    """Experts in three tensors [count * inner, hidden], a gate, an up and a down; the last is used
    as it lies, not transposed."""
    gate, up, down = (f"{name}.{part}" for part in parts)
    first, last = w.group.cut(inner, name)
    own = last - first

    def read(part: str, e: int) -> torch.Tensor:
        rows = ((e * inner + first, e * inner + last),)
        return w.read(part, (count * inner, hidden), (rows, None))

    sizes = (count, 2 * own, hidden), (count, hidden, own)
    gate_up = made(w, gate, sizes[0], lambda e: torch.cat((read(gate, e), read(up, e))))
    return Experts(
        gate_up, made(w, down, sizes[1], lambda e: read(down, e).t()), act, count, hidden
    )


class MoE:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    `router` names a matrix [experts, hidden], `wide`: multiplied in fp32; `shared` is an MLP that
    every token goes through.
    """

    def __init__(
        self,
        w: "Checkpoint",
        router: str,
        route: Route,
        experts: Experts,
        *,
        bias: bool = False,
        wide: bool = False,
        shared: "Part | None" = None,
    ) -> None:
        count, hidden = experts.count, experts.hidden
        self._wide = (
            w.read(f"{router}.weight", (count, hidden), None, torch.float32) if wide else None
        )
        self._router = None if wide else Linear(w, Shard(router, count, hidden), bias=bias)
        self._route = route
        if experts.act in KERNEL_NAMES:
            experts = replace(experts, act=KERNEL_NAMES[experts.act])
        self._experts = experts
        self._shared = shared
        self._group = w.group
        stacks = isinstance(experts.down, torch.Tensor | Coded)
        self._kernel = kernel("moe", w.device if stacks else torch.device("cpu"))

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: "Norm | None" = None,
    ) -> torch.Tensor:
        x = x if norm is None else norm(x)
        weights, chosen = self._route(self._logits(x, batch))
        y = self._mixed(x, weights, chosen)
        if batch.lora is not None and batch.lora.extra is not None and self._experts.sites:
            for rows, more in batch.lora.extra.experts(*self._experts.sites):
                own = self._mixed(x[rows], weights[rows], chosen[rows], more)
                y.index_copy_(0, rows, own)
        y = self._group.all_reduce(y)
        if add is not None:
            y = add.add_(y)
        return y if self._shared is None else self._shared(x, batch, add=y)

    def _mixed(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, more: Changes = None
    ) -> torch.Tensor:
        e, options = self._experts, {} if more is None else {"more": more}
        y: torch.Tensor = (self._kernel if more is None else moe).experts(
            x,
            e.gate_up,
            e.down,
            chosen,
            weights,
            e.act,
            gate_up_bias=e.gate_up_bias,
            down_bias=e.down_bias,
            limit=e.limit,
            **options,
        )
        return y

    def _logits(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        if self._router is not None:
            return self._router(x, batch).float()
        assert self._wide is not None
        return F.linear(x.float(), self._wide)


class InputScaled(MoE):
    """The router's weight scales what goes into the expert, not what comes out."""

    def _mixed(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: torch.Tensor, more: Changes = None
    ) -> torch.Tensor:
        return super()._mixed(x * weights.to(x.dtype), torch.ones_like(weights), chosen, more)
