"""Matrices of an adapter's file to where they belong by one call, in C; twin: kernels/spread.py.

The twin's many calls each give the interpreter's lock away, for which threads that read together
then wait.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvrun.runtime.kernels import spread as twin
from kvrun.runtime.kernels.native._build import declared
from kvrun.runtime.kernels.spread import Bits, Matrix

DTYPES = (torch.float32, torch.bfloat16)
_MOVE = np.dtype(
    {
        "names": ("begin", "rows", "columns", "stride", "apart", "target", "turned", "scale"),
        "formats": ("i8", "i8", "i8", "i8", "i8", "u8", "i4", "f4"),
    }
)


def available() -> bool:
    return _library() is not None


@cache
def _library() -> Any:
    at, long, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    function = [whole, at, at, long, at, long, whole, whole]
    return declared(Path(__file__).with_suffix(".c"), kvrun_spread=function)


def spread(part: Bits, matrices: Sequence[Matrix], stored: torch.dtype, dtype: torch.dtype) -> None:
    """As the twin, which does it for other dtypes than DTYPES."""
    if stored not in DTYPES or dtype not in DTYPES:
        twin.spread(part, matrices, stored, dtype)
        return
    whole, moves, begin = [], [], 0
    for (rows, columns), scale, targets in matrices:
        whole.append((begin, rows, columns, columns, 0, 0, 0, scale))
        for place, dim, ranges in targets:
            assert place.strides[1] == dtype.itemsize, "rows must be dense"
            address, apart = place.__array_interface__["data"][0], place.strides[0]
            for first, last in ranges or ((0, columns if dim else rows),):
                size = (rows, last - first) if dim else (last - first, columns)
                start = begin + first * (1 if dim else columns)
                step = apart // dtype.itemsize
                moves.append((start, *size, columns, step, address, not dim, scale))
                address += (last - first) * dtype.itemsize
        begin += rows * columns
    checked, made = np.array(whole, _MOVE), np.array(moves, _MOVE)
    finite = _library().kvrun_spread(
        part.ctypes.data, checked.ctypes.data, len(checked), made.ctypes.data, len(made),
        stored is torch.float32, dtype is torch.float32,
    )  # fmt: skip
    if not finite:
        raise OverflowError
