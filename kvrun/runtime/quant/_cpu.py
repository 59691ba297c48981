"""Products of codes on CPU: by a kernel in C, or where there is no compiler by torch's packed ones.

Torch's kernels are fast for bf16 rows only (30 to 100 times as fast as for others), so rows in
another dtype are rounded to bf16, as are scales; both cost about 3e-3 of a product.
"""

from typing import Any

import torch
import torch.nn.functional as F

from kvrun.runtime.device import native
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.kernels.w4a16 import Coded
from kvrun.runtime.quant import dense
from kvrun.runtime.quant._unfused import Unfused

_GROUPS = (256, 128, 64, 32)  # that the kernel of 4 bits knows
# From so many rows on, int8 codes are turned back to values first: 2 times as fast at 512.
_MANY = 128
_FEW = 24  # rows for which the kernel in C is faster than making values first
_VALUES = 1 << 22  # values made at once: what a cache holds
# Packed kernels read beyond the ends of other sizes.
_ROWS, _COLUMNS = 16, 32


def _whole(matrix: Coded) -> bool:
    return len(matrix.codes) % _ROWS == 0 and matrix.columns % _COLUMNS == 0 < matrix.columns


class Native(Unfused):
    """Codes of 4 or 8 bits in groups of whole blocks of 64 columns, by the kernel in C."""

    def __init__(self, matrix: Coded, bias: torch.Tensor | None) -> None:
        self._stored = _native().Stored(matrix._replace(order=None), bias)
        self._bias = bias
        self.nbytes: int = self._stored.nbytes

    @staticmethod
    def takes(matrix: Coded) -> bool:
        return bool(native("w4a16") and _native().takes(matrix))

    def takes_in(self, rows: int) -> bool:
        return rows <= _FEW

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        if x.shape[0] > _FEW:
            return _sum(self._many(x), self._bias, add, out)
        dtype, late = x.dtype, None
        if dtype is torch.float16:
            x = x.float()
        if add is not None and (add.dtype is not x.dtype or not add.is_contiguous()):
            add, late = None, add
        y: torch.Tensor = self._stored.linear(x, add=add, out=add, **fused)
        if x.dtype is dtype and late is None and out is None:
            return y  # a product is over sooner than the calls below
        return _sum(y.to(dtype), None, late, out)

    def _many(self, x: torch.Tensor) -> torch.Tensor:
        """Rows beyond which values are made first, a part of them at a time."""
        n, k = self._stored.shape
        wide = x.dtype is not torch.bfloat16 or dense.emulates_bf16()
        dtype = torch.float32 if wide else torch.bfloat16
        y = torch.empty((len(x), n), dtype=x.dtype)
        rows, step = x.to(dtype), max(1, _VALUES // k)
        for at in range(0, n, step):
            values = self._stored.values(dtype, at, min(at + step, n))
            y[:, at : at + step] = F.linear(rows, values)
        return y

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` of the matrix, as values."""
        wide = torch.float32 if dtype is torch.float16 else dtype
        values: torch.Tensor = self._stored.values(wide, 0, 0, ids)
        return values.to(dtype)


def _native() -> Any:
    return native("w4a16")


class Int4(Unfused):
    """4-bit codes with scales and zeros for groups of 32 columns or more."""

    def __init__(self, matrix: Coded, bias: torch.Tensor | None) -> None:
        group = next(size for size in _GROUPS if matrix.group % size == 0)
        codes = w4a16.unpack(matrix.codes, matrix.columns, 4).int()
        self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        # The kernel computes (code - 8) · scale + offset.
        scale = matrix.scale.float()
        offset = -scale * (0.0 if matrix.zero is None else matrix.zero.float())
        both = torch.stack([scale, offset], -1).transpose(0, 1)
        both = both.repeat_interleave(matrix.group // group, 0)[: matrix.columns // group]
        self._scales = both.bfloat16().contiguous()
        self.nbytes = self._packed.nbytes + self._scales.nbytes
        self._group = group
        self._bias = bias

    @staticmethod
    def takes(matrix: Coded) -> bool:
        coded = matrix.codes.dtype is torch.int32 and matrix.bits == 4 and matrix.table is None
        return coded and _whole(matrix) and matrix.group % _GROUPS[-1] == 0

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self._packed, self._group, self._scales
        )
        return _sum(y.to(x.dtype), self._bias, add, out)


class Int8(Unfused):
    """8-bit codes with one scale for a row."""

    def __init__(self, matrix: Coded, bias: torch.Tensor | None) -> None:
        codes = w4a16.unpack(matrix.codes, matrix.columns, 8)
        self._codes = (codes ^ 128).view(torch.int8)
        self._scale = matrix.scale.flatten().float()
        self._rounded = self._scale.bfloat16()
        self.nbytes = self._codes.nbytes + self._scale.nbytes + self._rounded.nbytes
        self._bias = bias

    @staticmethod
    def takes(matrix: Coded) -> bool:
        alone = matrix.group >= matrix.columns and matrix.zero is None
        return matrix.bits == 8 and matrix.codes.dtype is torch.int32 and alone and _whole(matrix)

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        if len(x) < _MANY:
            y = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self._codes, self._rounded)
        else:
            y = F.linear(x, self._codes.to(x.dtype)).mul_(self._scale)
        return _sum(y.to(x.dtype), self._bias, add, out)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` of the matrix, as values."""
        return (self._codes[ids] * self._scale[ids].unsqueeze(1)).to(dtype)


def _sum(
    y: torch.Tensor,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    out: torch.Tensor | None,
) -> torch.Tensor:
    for term in (bias, add):
        if term is not None:
            y.add_(term)
    return y if out is None else out.copy_(y)
