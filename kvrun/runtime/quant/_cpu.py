"""Products of codes on CPU, by torch's packed kernels.

These kernels are fast for bf16 rows only (30 to 100 times as fast as for others), so rows in
another dtype are rounded to bf16, as are scales; both cost about 3e-3 of a product.
"""

from typing import Any

import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import w4a16
from kvrun.runtime.kernels.w4a16 import Coded

_GROUPS = (256, 128, 64, 32)  # that the kernel of 4 bits knows
# From so many rows on, int8 codes are turned back to values first: 2 times as fast at 512.
_MANY = 128
# Packed kernels read beyond the ends of other sizes.
_ROWS, _COLUMNS = 16, 32


def _whole(matrix: Coded) -> bool:
    return len(matrix.codes) % _ROWS == 0 and matrix.columns % _COLUMNS == 0 < matrix.columns


class Int4:
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
        self._group = group
        self._bias = bias

    @staticmethod
    def takes(matrix: Coded) -> bool:
        coded = matrix.codes.dtype is torch.int32 and matrix.bits == 4 and matrix.table is None
        return coded and _whole(matrix) and matrix.group % _GROUPS[-1] == 0

    def takes_in(self, rows: int) -> bool:
        return False

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **prologue: Any,
    ) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self._packed, self._group, self._scales
        )
        return _sum(y.to(x.dtype), self._bias, add, out)


class Int8:
    """8-bit codes with one scale for a row."""

    def __init__(self, matrix: Coded, bias: torch.Tensor | None) -> None:
        codes = w4a16.unpack(matrix.codes, matrix.columns, 8)
        self._codes = (codes ^ 128).view(torch.int8)
        self._scale = matrix.scale.flatten().float()
        self._rounded = self._scale.bfloat16()
        self._bias = bias

    @staticmethod
    def takes(matrix: Coded) -> bool:
        alone = matrix.group >= matrix.columns and matrix.zero is None
        return matrix.bits == 8 and matrix.codes.dtype is torch.int32 and alone and _whole(matrix)

    def takes_in(self, rows: int) -> bool:
        return False

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **prologue: Any,
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
