"""Products of codes on a GPU: few rows by a kernel that streams codes, more by tensor cores."""

from typing import Any

import torch

from kvrun.runtime.device import kernel
from kvrun.runtime.kernels.w4a16 import Coded, beside
from kvrun.runtime.quant._unfused import Unfused

# Rows from which e4m3 on both sides is faster than e4m3 that becomes bf16.
_BOTH = 32
# Values made at once, of 16 bits: what a cache of 50 MB holds beside what they are made of.
_VALUES = 1 << 24


class Fused(Unfused):
    """Codes that are turned into values on their way into the product."""

    most: int | None = None  # rows that go through the kernel, where that is less than it takes

    def __init__(self, matrix: Coded, bias: torch.Tensor | None) -> None:
        self._matrix = beside(matrix._replace(order=None))
        self._order = matrix.order
        self._bias = bias
        self.nbytes = self._matrix.nbytes + (0 if self._order is None else self._order.nbytes)
        self._kernel = kernel("w4a16", matrix.codes.device)

    def takes_in(self, rows: int) -> bool:
        return self._order is None and bool(self._kernel.takes_in(rows, self._matrix))

    def gates(self, rows: int) -> bool:
        # On an H100 a layer of the 8B shape and one row takes 82.2 µs in 8 bits if it does, 82.5 if
        # gates are made in between, 84.1 by each program of the next product. Behind tensor cores
        # it takes longer: a step of 256 rows in 4 bits took 18.7 ms, not 18.5.
        fits = self._order is None and self._bias is None
        return fits and bool(self._kernel.gates(rows, self._matrix))

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        out = add if out is None else out
        if self._order is not None:
            x = x.index_select(1, self._order)
        few = self.most is None or len(x) <= self.most
        if few and self._kernel.serves(len(x), self._matrix):
            y: torch.Tensor = self._kernel.linear(
                x, self._matrix, bias=self._bias, add=add, out=out, **fused
            )
            return y
        y = self._many(x, **fused)
        if add is not None:
            y = add.add_(y)
        return y if out is None or out is y else out.copy_(y)

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` of the matrix, as values."""
        values: torch.Tensor = self._kernel.rows(self._matrix, ids, dtype)
        return values

    def _many(self, x: torch.Tensor, **fused: Any) -> torch.Tensor:
        """More rows than the kernel takes: by values that are still in the cache when used."""
        assert not fused
        n, k = len(self._matrix.codes), self._matrix.columns
        y = torch.empty((len(x), n), dtype=x.dtype, device=x.device)
        step = max(1, _VALUES // k // 128) * 128
        for at in range(0, n, step):
            some = slice(at, at + step)
            values = self._kernel.dequantise(_rows(self._matrix, some), x.dtype)
            if self._bias is None:
                torch.mm(x, values.t(), out=y[:, some])
            else:
                torch.addmm(self._bias[some], x, values.t(), out=y[:, some])
        return y


def _rows(matrix: Coded, some: slice) -> Coded:
    zero = matrix.zero if matrix.zero is None else matrix.zero[some]
    return matrix._replace(codes=matrix.codes[some], scale=matrix.scale[some], zero=zero)


class Scaled(Fused):
    """e4m3 with one scale for a row, for x in bf16: products of many rows run in 8 bits on both
    sides.

    Each row of x gets a scale of its own, by a kernel that takes in norms and gates.
    """

    def __init__(self, matrix: Coded, bias: torch.Tensor | None) -> None:
        super().__init__(matrix, bias)
        self._columns = matrix.scale.float().reshape(1, -1)
        self._rows = kernel("fp8", matrix.codes.device)
        n, k = matrix.codes.shape
        hopper = torch.cuda.get_device_capability(matrix.codes.device) >= (9, 0)
        self.most = _BOTH if hopper and n % 16 == 0 and k % 16 == 0 else None

    def takes_in(self, rows: int) -> bool:
        if self.most is not None and rows > self.most:
            return self._order is None
        return super().takes_in(rows)

    def _many(self, x: torch.Tensor, **fused: Any) -> torch.Tensor:
        if self.most is None:
            return super()._many(x, **fused)
        codes, scale = self._rows.quantise_rows(x, **fused)
        y: torch.Tensor = torch._scaled_mm(
            codes,
            self._matrix.codes.t(),
            scale_a=scale,
            scale_b=self._columns,
            bias=self._bias,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )
        return y
