"""Products with matrices of codes on CPU, in C; twin: kernels/w4a16.py.

Rows are rounded to 8 bits, each 64 columns by their largest value, which costs about 5e-3 of a
product; sums are whole numbers within such a block, and fp32 over blocks.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvrun.runtime.kernels import w4a16
from kvrun.runtime.kernels.native._build import declared
from kvrun.runtime.kernels.w4a16 import Coded

BLOCK, TILE = 64, 16  # columns, rows
ACTS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4}
_LEAST, _MOST = -8, 247  # zeros that the words of 4 bits have room for


class _Matrix(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("n", "k", "group", "bits")),
    )


def available() -> bool:
    return _library() is not None


@cache
def _library() -> Any:
    at, whole, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    product = [whole, *[at] * 5, ctypes.c_float, whole, long, whole, whole]
    values = [None, at, at, long, long, at, whole, whole]
    return declared(Path(__file__).with_suffix(".c"), kvrun_product=product, kvrun_values=values)


def takes(matrix: Coded) -> bool:
    """Whether `Stored` holds such codes to the bit, scales of 4 bits in bfloat16."""
    if matrix.codes.dtype is not torch.int32 or matrix.table is not None or not matrix.columns:
        return False
    group = min(matrix.group, matrix.columns)
    if matrix.columns % BLOCK or group % BLOCK or matrix.columns % group:
        return False
    zero = matrix.zero
    if zero is None:
        return True
    whole = matrix.bits == 4 and not zero.is_floating_point()
    return whole and int(zero.min()) >= _LEAST and int(zero.max()) <= _MOST


class Stored:
    """A matrix [N, K] as the kernel reads it, and its bias [N], fp32."""

    def __init__(self, matrix: Coded, bias: torch.Tensor | None = None) -> None:
        n, k, bits = len(matrix.codes), matrix.columns, matrix.bits
        self.shape = (n, k)
        codes = _tiled(w4a16.unpack(matrix.codes, k, bits), 1 << (bits - 1))
        codes = codes.view(-1, TILE, k // 4, 4).transpose(1, 2)
        if bits == 4:
            codes = codes[:, ::2] | codes[:, 1::2] << 4
        scale = _tiled(matrix.scale.float(), 0)
        if bits == 4:
            zero = torch.zeros_like(matrix.scale) if matrix.zero is None else matrix.zero
            above = scale.bfloat16().view(torch.int16).int() << 16
            scale = above | (_tiled(zero.int(), 0) + 8)
        scale = scale.view(-1, TILE, scale.shape[1]).transpose(1, 2)
        self._kept = codes.contiguous(), scale.contiguous(), None if bias is None else bias.float()
        self.nbytes = sum(part.nbytes for part in self._kept[:2] if part is not None)
        pointers = (None if part is None else part.data_ptr() for part in self._kept)
        self._matrix = _Matrix(*pointers, n, k, min(matrix.group, k), bits)
        self._at = ctypes.addressof(self._matrix)
        self._product, self._values = _library().kvrun_product, _library().kvrun_values

    def linear(
        self,
        x: torch.Tensor,
        *,
        add: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        eps: float = 0.0,
        act: str | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As the twin, of contiguous rows in bfloat16 or fp32; `out` may be `add`."""
        rows, dtype = x.shape[0], x.dtype
        if out is None:
            out = torch.empty((rows, self.shape[0]), dtype=dtype)
        done = self._product(
            self._at,
            x.data_ptr(),
            out.data_ptr(),
            None if add is None else add.data_ptr(),
            None if norm is None else norm.data_ptr(),
            eps,
            ACTS[act],
            rows,
            dtype is torch.float32,
            torch.get_num_threads(),
        )
        if not done:
            raise MemoryError("there is no memory for the rows of a product")
        return out

    def values(
        self, dtype: torch.dtype, first: int, last: int, ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows `first` to `last`, or rows `ids` [n], in bfloat16 or fp32."""
        count = last - first if ids is None else len(ids)
        out = torch.empty((count, self.shape[1]), dtype=dtype)
        at = None if ids is None else ids.data_ptr()
        wide = dtype is torch.float32
        self._values(self._at, at, first, count, out.data_ptr(), wide, torch.get_num_threads())
        return out


def _tiled(rows: torch.Tensor, value: int) -> torch.Tensor:
    """Rows, and some of `value` that fill up the last tile."""
    return torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % TILE), value=value)
