"""What adapters add to a product on CPU by one call, in C; twin: kernels/lora.py."""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvrun.runtime.kernels import lora as twin
from kvrun.runtime.kernels.native._build import declared

HEIGHT = 4  # rows of a tile at most
# Rows of one adapter up to which this is faster than ordinary products, by the dtypes it is for.
ROWS = {torch.float32: 16, torch.bfloat16: 32}
_ALONE = 1 << 20  # multiplications up to which other threads are not worth waiting for


class _Change(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("arena", "table", "rows", "tiles", "outs", "low")),
        *((name, ctypes.c_int64) for name in ("apart", "count", "features", "parts", "width")),
        ("wide", ctypes.c_int64),
    )


def available() -> bool:
    return _library() is not None


@cache
def _library() -> Any:
    at, long, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    change = [None, at, at, long, at, long, whole]
    return declared(Path(__file__).with_suffix(".c"), kvrun_change=change)


class Change:
    """What the adapters of a step add to one product; arguments are those of the twin's functions.

    Tiles have at most HEIGHT rows; `arena` is in a dtype of ROWS. One product at a time.
    """

    def __init__(
        self,
        arena: torch.Tensor,
        table: torch.Tensor,
        rows: torch.Tensor,
        tiles: torch.Tensor,
        *,
        features: int,
        outs: Sequence[int],
        width: int,
    ) -> None:
        self._where = arena, table, rows, tiles
        self._features, self._outs, self._width = features, outs, width
        sizes, low = (ctypes.c_int64 * len(outs))(*outs), torch.empty((len(rows), width))
        self._kept = sizes, low
        self._change = _Change(
            *(part.data_ptr() for part in self._where),
            ctypes.addressof(sizes),
            low.data_ptr(),
            table.stride(0),
            len(tiles),
            features,
            len(outs),
            width,
            arena.dtype is torch.float32,
        )
        self._at = ctypes.addressof(self._change)
        self._work = len(rows) * width * (features + sum(outs) // len(outs))
        self._call = _library().kvrun_change

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """B · A · x to y [tokens, Σ outs]; by the twin where rows do not lie in one piece."""
        if x.stride(1) != 1 or y.stride(1) != 1:
            sizes: dict[str, Any] = {"height": HEIGHT, "features": self._features}
            sums = twin.shrink(x, *self._where, **sizes, width=self._width)
            twin.expand(sums, y, *self._where, **sizes, outs=self._outs)
            return
        threads = 1 if self._work <= _ALONE else torch.get_num_threads()
        self._call(self._at, x.data_ptr(), x.stride(0), y.data_ptr(), y.stride(0), threads)
