"""Matrices of an adapter's file to where they belong: scaled, rounded once, turned."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

# Elements at a time that torch computes without asking other threads.
_GRAIN = 1 << 14
# numpy has no bf16; where values only move, their bits are enough.
_BITS = {2: torch.int16, 4: torch.int32}
Bits = np.ndarray[Any, np.dtype[Any]]


class Target(NamedTuple):
    """An array of bits [rows, columns], and what it takes of a matrix: these ranges of dimension
    `dim`, None for all. It is the matrix's transpose where `dim` is 0."""

    place: Bits
    dim: int
    ranges: tuple[tuple[int, int], ...] | None = None


class Matrix(NamedTuple):
    """A matrix of `shape`, times `scale`, and where it goes."""

    shape: tuple[int, ...]
    scale: float
    targets: Sequence[Target]


def bits(flat: torch.Tensor) -> Bits:
    """The same memory, as numpy knows it."""
    return flat.view(_BITS[flat.dtype.itemsize]).numpy()


def spread(part: Bits, matrices: Sequence[Matrix], stored: torch.dtype, dtype: torch.dtype) -> None:
    """Bytes [uint8] of `matrices`, one behind the other in `stored`, to targets of `dtype`.

    `part` may be overwritten. Raises OverflowError for values that are not finite in `dtype`.
    """
    values = torch.from_numpy(part).view(stored)
    if stored.itemsize == 2 and stored != dtype:
        values = _cast(values, torch.float32)
    at, found = 0, []
    scaled: dict[float, list[torch.Tensor]] = {}
    for matrix in matrices:
        count = matrix.shape[0] * matrix.shape[1]
        found.append((matrix, at, at + count))
        if matrix.scale != 1.0:
            scaled.setdefault(matrix.scale, []).extend(_small(values[at : at + count]))
        at += count
    for scale, chunks in scaled.items():
        # As a number it would be rounded to the dtype of the values before it is used.
        torch._foreach_mul_(chunks, torch.tensor(scale, dtype=torch.float64))
    if values.dtype != dtype:
        values = _cast(values, dtype)
    whole = bits(values)
    check_finite(whole, dtype)
    for matrix, begin, stop in found:
        tensor = whole[begin:stop].reshape(matrix.shape)
        for place, dim, ranges in matrix.targets:
            kept = _cut(tensor, dim, ranges)
            np.copyto(place, kept if dim else kept.T)


def check_finite(whole: Bits, dtype: torch.dtype) -> None:
    """Raises OverflowError for infinities and what is beyond them: every bit of the exponent."""
    infinity, below = _infinities(dtype)
    # Of positive and of negative values; room for their absolute values would take longer to get.
    if whole.max() >= infinity or whole.view(f"u{whole.itemsize}").max() >= below:
        raise OverflowError


@cache
def _infinities(dtype: torch.dtype) -> tuple[int, int]:
    """The bits of infinity, and of its negative as an unsigned number."""
    infinity = int(bits(torch.tensor([torch.inf], dtype=dtype))[0])
    return infinity, infinity | 1 << 8 * dtype.itemsize - 1


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found = torch.empty(len(values), dtype=dtype)
    torch._foreach_copy_(_small(found), _small(values))
    return found


def _small(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values.split(_GRAIN)  # type: ignore[no-untyped-call,no-any-return]


def _cut(matrix: Bits, dim: int, ranges: tuple[tuple[int, int], ...] | None) -> Bits:
    """The ranges of one dimension that a rank keeps, in the order in which it wants them."""
    if ranges is None or ranges == ((0, matrix.shape[dim]),):
        return matrix
    parts = [matrix[a:b] if dim == 0 else matrix[:, a:b] for a, b in ranges]
    return np.concatenate(parts, dim)
