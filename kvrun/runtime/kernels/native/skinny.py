"""Products of few rows with small matrices on CPU, in C; twin: kernels/skinny.py."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvrun.runtime.kernels.native._build import declared
from kvrun.runtime.kernels.native.w4a16 import ACTS

_ALONE = 1 << 17  # multiplications up to which other threads are not worth waiting for


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
        ("wide", ctypes.c_int32),
    )


def available() -> bool:
    return _library() is not None


@cache
def _library() -> Any:
    at, whole = ctypes.c_void_p, ctypes.c_int
    rows = [whole, *[at] * 5, ctypes.c_float, whole, whole, ctypes.c_int64, whole]
    return declared(Path(__file__).with_suffix(".c"), kvrun_rows=rows)


class Matrix:
    """weight [N, K] in fp32 or bfloat16 with dense rows, and a bias [N] of the same dtype."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        assert bias is None or (bias.dtype is weight.dtype and bias.is_contiguous())
        self._kept, self._dtype = (weight, bias), weight.dtype
        self.shape = n, k = weight.shape
        wide = weight.dtype is torch.float32
        places = (None if part is None else part.data_ptr() for part in self._kept)
        self._matrix = _Matrix(*places, n, k, wide)
        self._at = ctypes.addressof(self._matrix)
        self._rows = _library().kvrun_rows

    def linear(
        self,
        x: torch.Tensor,
        *,
        add: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        act: str | None = None,
        gated: str | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the twin, of contiguous x, `add` and `out` in the matrix's dtype."""
        (rows, width), (n, k) = x.shape, self.shape
        # What C would not see: it would read something else.
        assert x.dtype is self._dtype
        assert x.is_contiguous()
        assert width == (2 * k if act else k)
        if out is None:
            out = torch.empty((rows, n // 2 if gated else n), dtype=x.dtype)
        done = self._rows(
            self._at,
            x.data_ptr(),
            out.data_ptr(),
            None if add is None else add.data_ptr(),
            None if norm is None else norm.data_ptr(),
            eps,
            ACTS[act],
            ACTS[gated],
            rows,
            1 if rows * n * k <= _ALONE else torch.get_num_threads(),
        )
        if not done:
            raise MemoryError("there is no memory for the rows of a product")
        return out
