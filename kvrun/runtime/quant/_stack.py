"""Experts' matrices: codes of one kind or plain values in one tensor, or a product for each."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from kvrun.runtime.kernels import w4a16
from kvrun.runtime.kernels.moe import Stack
from kvrun.runtime.kernels.w4a16 import Coded
from kvrun.runtime.quant import _coded, dense
from kvrun.runtime.quant._cpu import Int4, Int8

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.quant import Weight

# Of one expert: its matrix, or parts of it that lie one below the other.
Find = Callable[[int], Sequence[torch.Tensor | Coded]]


def collect(w: "Checkpoint", count: int, shape: tuple[int, int], find: Find) -> Stack:
    """The matrices [out, in] of `count` experts, in the fastest form for the device.

    Beside the result there is one expert in memory, of codes on a GPU a second copy.
    """
    before = w.parameter_bytes
    first = joined(find(0))
    if isinstance(first, Coded) and packs(first):
        laid = [_product(joined(find(n)) if n else first, w.dtype) for n in range(count)]
        w.settle(before, sum(size for _, size in laid))
        return [weight.matmul for weight, _ in laid]
    held: list[Coded] = []
    values: torch.Tensor | None = None
    for n in range(count):
        found = joined(find(n)) if n else first
        if values is None and isinstance(found, Coded) and _goes_with(found, held, w):
            held.append(found)
            continue
        if values is None:
            values = torch.empty((count, *shape), dtype=w.dtype, device=w.device)
            for place, matrix in enumerate(held):
                w4a16.dequantise(matrix, w.dtype, values[place])
            held.clear()
        fill(values[n], found)
    if values is not None:
        w.settle(before, values.nbytes)
        return values
    stack = stacked(held)
    w.settle(before, stack.nbytes)
    return stack


def joined(parts: Sequence[torch.Tensor | Coded]) -> Coded | Sequence[torch.Tensor | Coded]:
    """One matrix of codes where parts are of one kind."""
    coded = [part for part in parts if isinstance(part, Coded)]
    alike = len({_coded.kind(part) for part in parts}) == 1
    return _coded.join(coded) if alike and len(coded) == len(parts) else parts


def fill(out: torch.Tensor, found: Coded | Sequence[torch.Tensor | Coded]) -> None:
    """The values of parts, one below the other, in `out` [out, in]."""
    at = 0
    for part in [found] if isinstance(found, Coded) else found:
        size = len(part.codes) if isinstance(part, Coded) else len(part)
        if isinstance(part, Coded):
            w4a16.dequantise(part, out.dtype, out[at : at + size])
        else:
            out[at : at + size] = part
        at += size


def stacked(matrices: Sequence[Coded]) -> Coded:
    """Matrices of one kind and size as a stack."""
    whole, count = _coded.join(matrices), len(matrices)
    codes, scale = (t.view(count, -1, t.shape[1]) for t in (whole.codes, whole.scale))
    zero = None if whole.zero is None else whole.zero.view(count, -1, whole.zero.shape[1])
    return whole._replace(codes=codes, scale=scale, zero=zero)


def packs(matrix: Coded) -> bool:
    """Whether a CPU has a product for these codes."""
    return matrix.codes.device.type == "cpu" and (Int4.takes(matrix) or Int8.takes(matrix))


def _product(
    found: Coded | Sequence[torch.Tensor | Coded], dtype: torch.dtype
) -> tuple["Weight", int]:
    if isinstance(found, Coded):
        return _coded.lay_out(found, dtype)
    sizes = [len(part.codes if isinstance(part, Coded) else part) for part in found]
    columns = found[0].columns if isinstance(found[0], Coded) else found[0].shape[1]
    values = torch.empty((sum(sizes), columns), dtype=dtype)
    fill(values, found)
    return dense.lay_out(values), values.nbytes


def _goes_with(matrix: Coded, held: Sequence[Coded], w: "Checkpoint") -> bool:
    """Whether a stack of codes that begins with `held` can go on with `matrix`."""
    if w.device.type != "cuda" or matrix.order is not None or not _coded.fuses(matrix, w.dtype):
        return False
    alike = (_coded.kind(matrix), matrix.group)
    return not held or alike == (_coded.kind(held[0]), held[0].group)
