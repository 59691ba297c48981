"""An adapter's file on its way into memory: read, hashed, spread, a few matrices at a time.

Several threads take one piece of the file each, small enough to stay in their caches until it lies
where it belongs. A piece costs few calls that give the interpreter's lock away, each of which may
have to wait for others to give it back; and none that starts threads of torch's own.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from kvrun.runtime.device import native
from kvrun.runtime.kernels import spread
from kvrun.runtime.kernels.spread import Bits, Target
from kvrun.runtime.tensorfile import Stored

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16
}  # fmt: skip
_PIECE = 4 << 20  # bytes
_THREADS = 12


@dataclass
class StoredMatrix:
    """One tensor of a file, times `scale`, and where it goes."""

    stored: Stored
    scale: float = 1.0
    targets: list[Target] = field(default_factory=list)


def lay_in(
    file: int, matrices: Sequence[StoredMatrix], dtype: torch.dtype, *, header: int
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
    kernel: Any = native("spread") or spread

    def work() -> None:
        buffer = np.empty(most, np.uint8)
        for number in left:
            piece = pieces[number]
            part = buffer[: _size(piece)]
            hashes[1 + number] = _read(file, part, piece[0].stored.start)
            matrices = [spread.Matrix(m.stored.shape, m.scale, m.targets) for m in piece]
            kernel.spread(part, matrices, DTYPES[piece[0].stored.dtype], dtype)

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


def _pieces(matrices: Iterable[StoredMatrix]) -> Iterator[list[StoredMatrix]]:
    """Neighbours in the file, stored alike."""
    piece: list[StoredMatrix] = []
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


def _joins(piece: Sequence[StoredMatrix], size: int, stored: Stored) -> bool:
    first = piece[0].stored
    return stored.dtype == first.dtype and stored.start == first.start + size


def _size(piece: Sequence[StoredMatrix]) -> int:
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
