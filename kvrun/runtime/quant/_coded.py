"""Matrices of codes: from what a format reads to the form that multiplies on the device."""

from collections.abc import Callable, Sequence
from itertools import groupby
from math import gcd
from typing import TYPE_CHECKING, Any

import torch

from kvrun.errors import BadCheckpoint
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.kernels.w4a16 import Coded
from kvrun.runtime.quant import dense
from kvrun.runtime.quant._cpu import Int4, Int8, Native
from kvrun.runtime.quant._cuda import Fused, Scaled
from kvrun.runtime.quant._unfused import Unfused

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.quant import Weight

# A matrix of codes; one that had to be made plain; None where it is stored plain.
Found = Coded | torch.Tensor | None
Decode = Callable[["Checkpoint", "Shard"], Found]
BLOCK = w4a16.block(4)


def affine(
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    bits: int,
    groups: torch.Tensor,
) -> Coded:
    """(code - zero) · scale of `codes` uint8 [N, K]; `zero` None: half the range of the codes.

    `scale`, `zero` [N, G]; `groups` as for `grouped`. Codes of 2 and 3 bits become codes of 4.
    """
    middle, kept = 1 << (bits - 1), max(bits, 4)
    if zero is not None:
        whole = not zero.is_floating_point()
        zero = (zero.short() if whole else zero) - middle
        if whole and bits < 8:
            zero = zero.to(torch.int8)
    return grouped(codes + ((1 << (kept - 1)) - middle), scale, groups, zero=zero, bits=kept)


def grouped(
    codes: torch.Tensor,
    scale: torch.Tensor,
    groups: torch.Tensor,
    *,
    zero: torch.Tensor | None = None,
    table: torch.Tensor | None = None,
    bits: int = 4,
) -> Coded:
    """A matrix of codes, each with the scale, and the zero, of its column's group.

    `codes` [N, K]: uint8 of so many `bits`, 4 or 8, which are packed; or e4m3. `scale`, `zero`
    [N, G]. `groups` [K] says which of the G groups a column belongs to, in any order.
    """
    order = None
    if bool((groups[1:] < groups[:-1]).any()):
        order = torch.argsort(groups, stable=True)
        groups, codes = groups[order], codes[:, order]
    last = int(groups.max()) if len(groups) else 0
    if last >= scale.shape[1] or (len(groups) and int(groups.min()) < 0):
        raise BadCheckpoint(
            f"a column of a quantized matrix belongs to group {last}; there are "
            f"{scale.shape[1]} groups of scales.",
            hint="fetch the model again",
        )
    size = _even(groups)
    scale = scale[:, groups[::size]].contiguous()
    if zero is not None:
        zero = zero[:, groups[::size]].contiguous() if bool(zero.any()) else None
    if codes.dtype is torch.uint8:
        codes = w4a16.pack(codes, bits)
    else:
        codes, bits = codes.contiguous(), 8
    return Coded(codes, scale, len(groups), size, zero, table, order, bits)


def _even(groups: torch.Tensor) -> int:
    """The largest size in which columns, sorted by group, can be cut so that groups are whole."""
    k = len(groups)
    starts = (groups[1:] != groups[:-1]).nonzero().flatten() + 1
    size = gcd(k, *starts.tolist()) if len(starts) else max(k, 1)
    return size if size == k else _fitting(size)


def _fitting(group: int) -> int:
    """The largest part of a group that packed blocks consist of, or that consists of blocks."""
    return group if group % BLOCK == 0 else gcd(group, BLOCK)


def refined(matrix: Coded, group: int) -> Coded:
    """The same matrix with scales for groups of `group` columns, which divides its own."""
    if group == matrix.group:
        return matrix
    first = torch.arange(0, matrix.columns, group, device=matrix.scale.device) // matrix.group
    zero = None if matrix.zero is None else matrix.zero[:, first]
    return matrix._replace(scale=matrix.scale[:, first], zero=zero, group=group)


def join(parts: Sequence[Coded]) -> Coded:
    """Matrices of one kind, one below the other."""
    if len(parts) == 1:
        return parts[0]
    group = gcd(*(part.group for part in parts))
    if len({part.group for part in parts}) > 1:
        group = _fitting(group)
    parts = [refined(part, group) for part in parts]
    zero = None
    if any(part.zero is not None for part in parts):
        zero = torch.cat(
            [
                torch.zeros_like(p.scale, dtype=torch.float32) if p.zero is None else p.zero.float()
                for p in parts
            ]
        )
        if all(p.zero is None or not p.zero.is_floating_point() for p in parts):
            zero = zero.to(torch.int16 if parts[0].bits == 8 else torch.int8)
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(parts[0].codes.dtype)
    return parts[0]._replace(
        codes=codes, scale=torch.cat([part.scale for part in parts]), zero=zero, group=group
    )


def kind(part: Found) -> tuple[object, ...]:
    """What two matrices must share to be joined."""
    if not isinstance(part, Coded):
        return (None,)
    order = None if part.order is None else tuple(part.order.tolist())
    table = None if part.table is None else tuple(part.table.tolist())
    return (part.codes.dtype, part.bits, part.scale.dtype, part.columns, order, table)


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool, decode: Decode) -> "Weight":
    """The matrices of `shards`, each as `decode` finds it, or plain where that finds none."""
    added = w.vector(*shards) if bias else None
    before = w.parameter_bytes
    parts = [(shard, decode(w, shard)) for shard in shards]
    runs = [list(run) for _, run in groupby(parts, key=lambda pair: kind(pair[1]))]
    weights: list[Weight] = []
    kept = at = 0
    for run in runs:
        coded = [part for _, part in run if isinstance(part, Coded)]
        end = at + sum(shard.shape[0] for shard, _ in run)
        own = None if added is None else added[at:end]
        at = end
        if coded:
            weight, size = lay_out(join(coded), w.dtype, own)
        else:
            values = [
                part if isinstance(part, torch.Tensor) else w.matrix(shard) for shard, part in run
            ]
            plain = values[0] if len(values) == 1 else torch.cat(values)
            weight, size = dense.lay_out(plain, own), plain.nbytes
        weights.append(weight)
        kept += size
    w.settle(before, kept)
    return weights[0] if len(weights) == 1 else Beside(weights)


def lay_out(
    matrix: Coded, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> tuple["Weight", int]:
    """A weight for inputs of `dtype` in the fastest form for its device, and its bytes."""
    if (found := keep(matrix, dtype, bias)) is not None:
        return found, found.nbytes
    values = w4a16.dequantise(matrix, dtype)
    return dense.lay_out(values, bias), values.nbytes


def keep(
    matrix: Coded, dtype: torch.dtype, bias: torch.Tensor | None = None
) -> "Native | Int4 | Int8 | Fused | Gathered | None":
    """A weight that multiplies by the codes; None where its device cannot."""
    if matrix.codes.device.type == "cuda":
        if not fuses(matrix, dtype):
            return None
        one = matrix.group >= matrix.columns
        eight = matrix.codes.dtype is torch.float8_e4m3fn
        if eight:
            refuse_nan(matrix.codes)
        scaled = eight and one and dtype is torch.bfloat16
        return (Scaled if scaled else Fused)(matrix, bias)
    kind = next((kind for kind in (Native, Int4, Int8) if kind.takes(matrix)), None)
    if kind is None:
        return None
    found = kind(matrix, bias)
    return found if matrix.order is None else Gathered(found, matrix.order)


def refuse_nan(codes: torch.Tensor) -> None:
    """Kernels read the bits of e4m3's NaN as a number. Raises BadCheckpoint."""
    if bool((codes.view(torch.uint8) & 0x7F == 0x7F).any()):
        raise BadCheckpoint("a matrix of 8-bit floats holds NaN.", hint="fetch the model again")


def fuses(matrix: Coded, dtype: torch.dtype) -> bool:
    """Whether the kernels of a GPU multiply rows of `dtype` by these codes."""
    eight = matrix.codes.dtype is torch.float8_e4m3fn
    # Kernels load a scale for so many columns at least.
    least = w4a16.block(8) if eight else w4a16.WORDS
    whole = not eight or matrix.columns % 4 == 0  # words
    even = matrix.group >= matrix.columns or matrix.group % least == 0
    return dtype.itemsize == 2 and whole and even


class Gathered(Unfused):
    """A weight whose columns stand in another order than the values of a row."""

    def __init__(self, weight: Native | Int4 | Int8, order: torch.Tensor) -> None:
        self._weight = weight
        self._order = order
        self.nbytes = weight.nbytes + order.nbytes

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        return self._weight.matmul(x.index_select(1, self._order), add, out)


class Beside(Unfused):
    """Weights that share their input; their outputs stand side by side."""

    def __init__(self, weights: "Sequence[Weight]") -> None:
        self._weights = weights

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        y = torch.cat([weight.matmul(x) for weight in self._weights], 1)
        if add is not None:
            y += add
        return y if out is None else out.copy_(y)
