"""Small plain matrices on CPU: few rows by the kernel in C, which costs a call and no more."""

from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.device import native

if TYPE_CHECKING:
    from kvrun.runtime.quant import Weight

# Measured on two cores of an EPYC with AVX-512, matrices of 65 to 524 thousand elements: one row in
# fp32 takes 23 us, not 59 by MKL, 8 take 38, not 91; one row in bf16 15, not 30 by oneDNN, which
# multiplies more of them faster. Of larger matrices both wait for the memory.
LARGEST = 1 << 19  # elements
_ROWS = {torch.float32: 8, torch.bfloat16: 1}


def takes(weight: torch.Tensor) -> bool:
    small = 0 < weight.numel() <= LARGEST and weight.dtype in _ROWS
    return small and weight.device.type == "cpu" and native("skinny") is not None


class Small:
    """A matrix that `takes` knows [out, in]; more rows are left to `rest`, which holds the same: in
    bf16 a second time, 1 MB at most."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, rest: "Weight") -> None:
        self._weight, self._gates = weight.contiguous(), bias is None
        module: Any = native("skinny")
        self._linear = module.Matrix(self._weight, bias).linear
        self.rest, self._rows = rest, _ROWS[weight.dtype]

    def plain(self) -> torch.Tensor:
        return self._weight

    def takes_in(self, rows: int) -> bool:
        return rows <= self._rows

    def gates(self, rows: int) -> bool:
        return self._gates and rows <= self._rows

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        if x.shape[0] > self._rows:
            return self.rest.matmul(x, add, out)
        late = None
        if add is not None and not (add.is_contiguous() and add.dtype is x.dtype):
            add, late = None, add
        place = out if late is None and out is not None and out.is_contiguous() else None
        y: torch.Tensor = self._linear(x.contiguous(), add=add, out=place, **fused)
        if late is not None:
            y += late
        return y if out is None or out is place else out.copy_(y)
