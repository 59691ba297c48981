"""Plain matrices in 16 or 32 bits, laid out for the device's fastest product."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.quant import Weight

# oneDNN chooses the layout for this many rows. Measured on AVX-512 in fp32: packed for 32 rows, one
# row takes 0.3 to 0.6 of what it takes packed for one; in bf16 it makes no difference.
_ROWS = 32
# A call of oneDNN costs about 12 µs before it computes anything, plain products 1 µs: up to this
# many elements the plain fp32 product of one row is done first, and eight rows take as long.
_SMALL = 1 << 16


class Plain:
    """[out, in], as in the file."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def matmul(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        if add is None:
            return F.linear(x, self._weight, self._bias)
        if self._bias is None:
            return torch.addmm(add, x, self._weight.t())
        return F.linear(x, self._weight, self._bias).add_(add)


class Packed:
    """Blocks in oneDNN's own order (CPU): 1.3 to 3 times as fast as `Plain` from 1 to 500 rows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
        self._bias = bias
        self._product = torch.ops.mkldnn._linear_pointwise.default
        self._sum = torch.ops.mkldnn._linear_pointwise.binary

    def matmul(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        if add is None:
            y: torch.Tensor = self._product(x, self._weight, self._bias, "none", [], "")
        else:
            y = self._sum(x, add, self._weight, self._bias, "add")
        return y


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return lay_out(w.matrix(*shards), w.vector(*shards) if bias else None)


def lay_out(weight: torch.Tensor, bias: torch.Tensor | None = None) -> "Weight":
    """`weight` [out, in] in the form that multiplies fastest where it lies."""
    small = weight.dtype is torch.float32 and weight.numel() <= _SMALL
    if weight.device.type == "cpu" and not small and weight.numel() and packs(weight.dtype):
        return Packed(weight, bias)
    return Plain(weight, bias)


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
