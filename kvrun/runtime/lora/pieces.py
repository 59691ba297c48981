"""An adapter's file on its way into memory: read, hashed, scaled, turned, a few matrices at a time.

Several threads take one piece of the file each, small enough to stay in their caches until it lies
where it belongs. A piece costs few calls that give the interpreter's lock away, each of which may
have to wait for the engine to give it back; and none that starts threads of torch's own.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from kvrun.runtime.source import Ranges
from kvrun.runtime.tensorfile import Stored

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16
}  # fmt: skip
_PIECE = 4 << 20  # bytes
_THREADS = 8
# Elements at a time that torch computes without asking other threads.
_GRAIN = 1 << 14
# numpy has no bf16; where values only move, their bits are enough.
_BITS = {2: torch.int16, 4: torch.int32}
Bits = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Matrix:
    """One tensor of a file, times `scale`, and where it goes.

    A target is an array of bits [rows, columns], and what it takes of the tensor: these ranges of
    dimension `dim`. It is the tensor's transpose where `dim` is 0.
    """

    stored: Stored
    scale: float = 1.0
    targets: list[tuple[Bits, int, Ranges | None]] = field(default_factory=list)


def bits(flat: torch.Tensor) -> Bits:
    """The same memory, as numpy knows it."""
    return flat.view(_BITS[flat.dtype.itemsize]).numpy()


def lay_in(
    file: int, matrices: Sequence[Matrix], dtype: torch.dtype, *, header: int
) -> list[bytes]:
    """Bring matrices of an open file to their targets, which are of `dtype`.

    They are rounded once, when they are scaled. Returns hashes of the first `header` bytes and of
    all matrices, in order. Raises EOFError if the file is shorter, OverflowError for values that
    are not finite in `dtype`, and OSError.
    """
    pieces = list(_pieces(sorted(matrices, key=lambda matrix: matrix.stored.start)))
    hashes = [_read(file, np.empty(header, np.uint8), 0)] + [b""] * len(pieces)
    most = max((_size(piece) for piece in pieces), default=0)
    left = iter(range(len(pieces)))

    def work() -> None:
        buffer = np.empty(most, np.uint8)
        for number in left:
            piece = pieces[number]
            part = buffer[: _size(piece)]
            hashes[1 + number] = _read(file, part, piece[0].stored.start)
            _spread(part, piece, dtype)

    workers = max(1, min(_THREADS, os.cpu_count() or 1, len(pieces)))
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(work) for _ in range(workers)]:
            done.result()
    return hashes


def tensor(file: int, stored: Stored) -> tuple[torch.Tensor, bytes]:
    """One tensor of an open file, and the hash of its bytes. Raises as `lay_in`."""
    buffer = np.empty(stored.nbytes, np.uint8)
    hashed = _read(file, buffer, stored.start)
    return torch.from_numpy(buffer).view(DTYPES[stored.dtype]).view(stored.shape), hashed


def _pieces(matrices: Iterable[Matrix]) -> Iterator[list[Matrix]]:
    """Neighbours in the file, stored alike."""
    piece: list[Matrix] = []
    size = 0
    for matrix in matrices:
        more = matrix.stored.nbytes
        if piece and (size + more > _PIECE or not _joins(piece, size, matrix.stored)):
            yield piece
            piece, size = [], 0
        piece.append(matrix)
        size += more
    if piece:
        yield piece


def _joins(piece: Sequence[Matrix], size: int, stored: Stored) -> bool:
    first = piece[0].stored
    return stored.dtype == first.dtype and stored.start == first.start + size


def _size(piece: Sequence[Matrix]) -> int:
    return sum(matrix.stored.nbytes for matrix in piece)


def _read(file: int, buffer: Bits, start: int) -> bytes:
    """Fill a buffer; the hash of what it has got."""
    view, done = buffer.data, 0
    while done < len(view):
        count = os.preadv(file, [view[done:]], start + done)
        if not count:
            raise EOFError
        done += count
    return sha256(view).digest()


def _spread(part: Bits, piece: Sequence[Matrix], dtype: torch.dtype) -> None:
    """The bytes of a piece to their targets."""
    values = torch.from_numpy(part).view(DTYPES[piece[0].stored.dtype])
    if values.dtype.itemsize == 2 and values.dtype != dtype:
        values = _cast(values, torch.float32)
    at, found = 0, []
    scaled: dict[float, list[torch.Tensor]] = {}
    for matrix in piece:
        count = matrix.stored.nbytes // DTYPES[matrix.stored.dtype].itemsize
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
        tensor = whole[begin:stop].reshape(matrix.stored.shape)
        for target, dim, ranges in matrix.targets:
            kept = _cut(tensor, dim, ranges)
            np.copyto(target, kept if dim else kept.T)


def check_finite(whole: Bits, dtype: torch.dtype) -> None:
    """Infinities and what is beyond them have every bit of the exponent."""
    infinity = int(bits(torch.tensor([torch.inf], dtype=dtype))[0])
    if (whole & np.iinfo(whole.dtype).max).max() >= infinity:
        raise OverflowError


def _cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    found = torch.empty(len(values), dtype=dtype)
    torch._foreach_copy_(_small(found), _small(values))
    return found


def _small(values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return values.split(_GRAIN)  # type: ignore[no-untyped-call,no-any-return]


def _cut(matrix: Bits, dim: int, ranges: Ranges | None) -> Bits:
    """The ranges of one dimension that a rank keeps, in the order in which it wants them."""
    if ranges is None or ranges == ((0, matrix.shape[dim]),):
        return matrix
    parts = [matrix[a:b] if dim == 0 else matrix[:, a:b] for a, b in ranges]
    return np.concatenate(parts, dim)
