"""Plain matrices in 16 or 32 bits, laid out for the device's fastest product."""

import platform
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from kvrun.runtime.device import kernel
from kvrun.runtime.quant import _small
from kvrun.runtime.quant._unfused import Unfused

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.quant import Weight

# oneDNN chooses the layout for this many rows. Measured on AVX-512 in fp32: packed for 32 rows, one
# row takes 0.3 to 0.6 of what it takes packed for one; in bf16 it makes no difference.
_ROWS = 32
# A call of oneDNN costs 12 to 17 µs before it computes anything, plain products 1 µs. Up to so many
# elements that decides: in fp32 for up to a dozen rows (and more take as long), in bf16 for one.
_SMALL = 1 << 19
_SMALL_ROW = 1 << 18
# Without bf16 instructions oneDNN multiplies bf16 row by row at a fraction of the fp32 speed. From
# so many rows on it pays to turn a matrix of up to so many elements to fp32 for the product.
_WIDENS = ((1 << 19, 4), (1 << 20, 8), (1 << 26, 64))
_KEPT = 1 << 20  # up to this many elements the rows of the file are kept, which turn faster
_NEVER = 1 << 62


class Plain(Unfused):
    """[out, in], as in the file."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self._turned = weight.t()
        self._bias = bias

    def plain(self) -> torch.Tensor:
        return self.weight

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        if add is None:
            y = F.linear(x, self.weight, self._bias)
        elif self._bias is None:
            y = torch.addmm(add, x, self._turned)
        else:
            y = F.linear(x, self.weight, self._bias).add_(add)
        return y if out is None else out.copy_(y)


class Cuda:
    """[out, in] on a GPU: few rows by a kernel that streams the matrix, more by cuBLAS."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias
        self._skinny = kernel("skinny", weight.device)

    def plain(self) -> torch.Tensor:
        return self._weight

    def takes_in(self, rows: int) -> bool:
        return bool(self._skinny.takes_in(rows, self._weight.dtype))

    def _streams(self, rows: int) -> bool:
        return bool(self._skinny.serves(rows, self._weight))

    def gates(self, rows: int) -> bool:
        # Else each program of the next product computes all gates: on an H100 a step of 8 rows of
        # the 0.6B shape took 1.41 ms, not 1.35, of one row of the 8B shape 5.84, not 5.80.
        return self._bias is None and self._streams(rows)

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        out = add if out is None else out
        if fused or self._streams(len(x)):
            y: torch.Tensor = self._skinny.linear(
                x, self._weight, bias=self._bias, add=add, out=out, **fused
            )
            return y
        if add is not None:
            y = add.addmm_(x, self._weight.t())
            return y if self._bias is None else y.add_(self._bias)
        if out is not None and self._bias is None:
            return torch.mm(x, self._weight.t(), out=out)
        y = F.linear(x, self._weight, self._bias)
        return y if out is None else out.copy_(y)


class Packed(Unfused):
    """Blocks in oneDNN's own order (CPU): 1.3 to 3 times as fast as `Plain` from 1 to 500 rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._widens = _widens(weight)
        self._row = weight.numel() <= _SMALL_ROW
        kept = self._row or (self._widens < _NEVER and weight.numel() <= _KEPT)
        self._plain = Plain(weight, bias) if kept else None
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._sum = torch.ops.mkldnn._linear_pointwise.binary

    def plain(self) -> torch.Tensor:
        """A copy [out, in]."""
        copy: torch.Tensor = self._weight.to_dense()
        return copy

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        rows = x.shape[0]  # len() goes through Python
        if rows == 1 and self._plain is not None and self._row:
            return self._plain.matmul(x, add, out)
        if rows >= self._widens:
            y: torch.Tensor = self._wide(x, add)
            return y if out is None else out.copy_(y)
        if add is None:
            y = self._product(x, self._weight, self._bias, "none", [], "")
        else:
            y = self._sum(x, add, self._weight, self._bias, "add")
        return y if out is None else out.copy_(y)

    def _wide(self, x: torch.Tensor, add: torch.Tensor | None) -> torch.Tensor:
        """The product in fp32, and everything behind it, rounded once."""
        if self._plain is not None:
            weight = self._plain.weight.float()
        else:
            weight = self._weight.to_dense(torch.float32)
        y = F.linear(x.float(), weight)
        for term in (self._bias, add):
            if term is not None:
                y += term
        return y.to(x.dtype)


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return lay_out(w.matrix(*shards), w.vector(*shards) if bias else None)


def lay_out(weight: torch.Tensor, bias: torch.Tensor | None = None) -> "Weight":
    """`weight` [out, in] in the form that multiplies fastest where it lies."""
    if weight.is_cuda:
        return Cuda(weight, bias)
    small = weight.dtype is torch.float32 and weight.numel() <= _SMALL
    packed = weight.device.type == "cpu" and not small and weight.numel() and packs(weight.dtype)
    made = Packed(weight, bias) if packed else Plain(weight, bias)
    return _small.Small(weight, bias, made) if _small.takes(weight) else made


def _widens(weight: torch.Tensor) -> int:
    """Rows from which on `weight` [out, in] is turned to fp32 for a product."""
    if weight.dtype is not torch.bfloat16 or not emulates_bf16():
        return _NEVER
    return next((rows for most, rows in _WIDENS if weight.numel() <= most), _NEVER)


@cache
def emulates_bf16() -> bool:
    """Whether this is an x86 CPU without products in bf16."""
    known = [
        getattr(torch.cpu, name, lambda: True)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    ]
    return platform.machine() in ("x86_64", "AMD64") and not any(known)


@cache
def packs(dtype: torch.dtype) -> bool:
    """Whether this machine's torch multiplies packed matrices of `dtype`, tried on a small one."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._has_mkldnn:
        return False
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    eye = torch.eye(16, dtype=dtype)
    try:
        return torch.equal(Packed(eye, None).matmul(eye, eye), eye + eye)
    except (RuntimeError, AttributeError):
        return False
