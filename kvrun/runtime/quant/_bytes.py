"""Codes of one byte, [out, in] as in the file, with a scale for all, for rows or for blocks."""

from typing import TYPE_CHECKING

import torch

from kvrun.errors import BadCheckpoint
from kvrun.runtime.checkpoint import Ranges
from kvrun.runtime.quant import _coded

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.kernels.w4a16 import Coded

SQUARE = (128, 128)


def read(
    w: "Checkpoint",
    s: "Shard",
    codes: str,
    scale: str,
    dtype: torch.dtype,
    block: tuple[int, int] | None = None,
) -> "Coded":
    """The kept part of the matrix `codes` times its `scale`, both full names.

    The scale is one value, [N] or [N, 1] for rows, or [N / block, K / block]; without files it is
    what `block` says.
    """
    n, k = s.out_features, s.in_features
    rows, cols = block or (1, k)
    shape, kept = w.find(scale, (-(-n // rows), -(-k // cols)), torch.float32, any_rank=True)
    values = w.read(scale, shape, None, kept)
    if values.numel() == 1:
        values, rows, cols = values.reshape(1, 1), n, k
    elif values.shape in ((n,), (n, 1)):
        values, rows, cols = values.reshape(n, 1), 1, k
    else:
        rows, cols = block or SQUARE
        if values.shape != (-(-n // rows), -(-k // cols)):
            raise BadCheckpoint(
                f"{scale} is {list(shape)}; {codes} of [{n}, {k}] has no such parts.",
                hint="fetch the model again, or check that config.json belongs to these weights",
            )
    values = values[places(n, s.rows, w) // rows]
    matrix = w.read(codes, (n, k), (s.rows, s.cols), dtype)
    if dtype is torch.int8:
        matrix = matrix.view(torch.uint8) ^ 128
    return _coded.grouped(matrix, values, places(k, s.cols, w) // cols, bits=8)


def places(size: int, ranges: Ranges | None, w: "Checkpoint") -> torch.Tensor:
    places = torch.arange(size, device=w.device)
    return places if ranges is None else torch.cat([places[a:b] for a, b in ranges])
