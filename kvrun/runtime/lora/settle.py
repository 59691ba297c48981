"""What an adapter's vectors become once its base is at hand: DoRA's factors, shifts of biases."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvrun.runtime.lora.sites import Extra
from kvrun.runtime.quant._small import Small
from kvrun.runtime.quant.dense import Cuda, Packed, Plain

if TYPE_CHECKING:
    from kvrun.runtime.lora.resident import Resident
    from kvrun.runtime.quant import Weight

_COLUMNS = 512  # of a matrix that are seen in fp32 at once
Columns = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Matrix:
    """The matrix that adapters change, as this rank has it.

    `columns` (first, last) gives so many of its `inner` columns, turned: [columns, out]. `bias`
    [out] is a part of the product, `late` [out] is added behind the sum over ranks, which is
    `reduce`.
    """

    columns: Columns
    inner: int
    bias: torch.Tensor | None = None
    late: torch.Tensor | None = None
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None


def matrix_of(
    weight: "Weight",
    x: torch.Tensor,
    late: torch.Tensor | None = None,
    reduce: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Matrix:
    """Of a stored matrix in any form; `x` [tokens, in] is like its inputs."""
    bias = weight.matmul(x.new_zeros(1, x.shape[1]))[0].float()
    if isinstance(weight, Plain | Cuda | Packed | Small):
        whole = weight.plain()
        return Matrix(lambda a, b: whole[:, a:b].t(), x.shape[1], bias, late, reduce)

    def columns(first: int, last: int) -> torch.Tensor:
        one_hot = x.new_zeros(last - first, x.shape[1])
        one_hot[:, first:last].fill_diagonal_(1.0)
        return weight.matmul(one_hot).float() - bias

    return Matrix(columns, x.shape[1], bias, late, reduce)


def settle(resident: "Resident", slot: int, site: int, base: Matrix) -> None:
    """Make factor and shift of one adapter and product final, in the arena.

    factor = magnitude / ‖row of W + B · A‖ (DoRA, 2024, section 4.3). The bias is outside of it:
    what the product has of it is taken off again by the shift.
    """
    adapter = resident.adapter(slot)
    extra, sites = adapter.source.layout.extras[site], resident.sites
    flat = resident.stretch(adapter)
    added = sites.vector(flat, extra.shift, site)
    shift, factor = added.clone(), torch.ones_like(added)
    if extra.factor is not None:
        stored = sites.vector(flat, extra.factor, site)
        norms = _norms(resident, slot, site, extra, base)
        for part in extra.magnitudes:
            mine = _slice(sites.outs[site], part)
            # A row of zeros is padding.
            found = torch.where(norms[mine] > 0, stored[mine] / norms[mine], 0.0)
            factor[mine] = found
    inside = torch.zeros_like(shift) if base.bias is None else base.bias.float()
    behind = torch.zeros_like(shift) if base.late is None else base.late.float()
    for part in range(len(sites.outs[site])):
        mine = _slice(sites.outs[site], part)
        if part not in extra.biases:
            shift[mine] += inside[mine] + behind[mine]
        if part not in extra.weights:
            shift[mine] -= factor[mine] * inside[mine]
    # All at the end: a step that fails half-way is tried again.
    added.copy_(shift.sub_(behind))
    if extra.factor is not None:
        sites.vector(flat, extra.factor, site).copy_(factor)
    adapter.settled.add(site)


def _norms(resident: "Resident", slot: int, site: int, extra: Extra, base: Matrix) -> torch.Tensor:
    """‖row of W + B · A‖ [out], over all ranks."""
    outs = resident.sites.outs[site]
    a, bs = resident.matrices(slot, site)
    sums = torch.zeros(sum(outs), device=a.device)
    for first in range(0, base.inner, _COLUMNS):
        last = min(first + _COLUMNS, base.inner)
        columns, begin = base.columns(first, last).to(torch.float32, copy=True), 0
        for part, b in enumerate(bs):
            if part in extra.magnitudes:
                low = a[begin : begin + len(b), first:last].float().t()
                columns[:, _slice(outs, part)] += low @ b.float()
            begin += len(b)
        sums += columns.square().sum(0)
    return (sums if base.reduce is None else base.reduce(sums)).sqrt()


def _slice(outs: list[int], part: int) -> slice:
    return slice(sum(outs[:part]), sum(outs[: part + 1]))
