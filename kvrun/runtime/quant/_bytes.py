"""Codes of one byte, [out, in] as in the file, with a scale for all, for rows or for blocks."""

from typing import TYPE_CHECKING

import torch

from kvrun.errors import BadCheckpoint
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.quant import _coded
from kvrun.runtime.source import Ranges

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


def block_of(c: HFConfig, name: str) -> tuple[int, int] | None:
    """Rows and columns of a block, as a list of two; None where the configuration has none."""
    value = c.get(name)
    if value is None:
        return None
    whole = isinstance(value, list) and all(type(v) is int and v > 0 for v in value)
    if not whole or len(value) != 2:
        raise BadCheckpoint(
            f"the quantization config says '{name}': {str(value)[:60]}.",
            cause="a block is two whole numbers of at least 1",
            hint="fetch the model again",
        )
    return value[0], value[1]


def places(size: int, ranges: Ranges | None, w: "Checkpoint") -> torch.Tensor:
    places = torch.arange(size, device=w.device)
    return places if ranges is None else torch.cat([places[a:b] for a, b in ranges])
