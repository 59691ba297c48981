"""Products with matrices of 4- or 8-bit codes and 16-bit rows: the twin of `triton/w4a16.py`.

Codes lie in words of 32 bits, in blocks of 32 words: word j of a block holds in its field i, the
lowest bits first, column 32 · i + j. So the columns of one field of neighbouring words are
neighbours too, and a group of 32 columns or more is a range of fields.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from kvrun.runtime.kernels.skinny import activate

WORDS = 32  # of a block
_PIECE = 1 << 22  # values that are worked on at once


class Coded(NamedTuple):
    """A matrix [N, K] = (code - zero) · scale, or table[code] · scale.

    `codes`: int32 [N, words] as `pack` lays codes of `bits`, 4 or 8; what counts is their distance
    from the middle of their range. Or float8_e4m3fn [N, K], of 8 `bits`. `scale`
    [N, ceil(K / group)]; `zero`, float or int, the same, None: 0. `table`: fp32 [16], of 4-bit
    codes. `order` [K]: codes of column c belong to column order[c].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    columns: int  # K
    group: int
    zero: torch.Tensor | None = None
    table: torch.Tensor | None = None
    order: torch.Tensor | None = None
    bits: int = 4

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self if isinstance(t, torch.Tensor))


def block(bits: int) -> int:
    """Columns of a block of codes of so many bits."""
    return WORDS * (32 // bits)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K] of values below 2^bits -> int32 [N, 32 · ceil(K / block)]."""
    n, k = codes.shape
    codes = F.pad(codes, (0, -k % block(bits)), value=1 << (bits - 1)).view(
        n, -1, 32 // bits, WORDS
    )
    words = torch.zeros((n, codes.shape[1], WORDS), dtype=torch.int32, device=codes.device)
    for field in range(codes.shape[2]):
        words |= codes[:, :, field].int() << (bits * field)
    return words.flatten(1)


def unpack(words: torch.Tensor, k: int, bits: int) -> torch.Tensor:
    """The reverse of `pack`: uint8 [N, k]."""
    blocks, mask = words.view(len(words), -1, 1, WORDS), (1 << bits) - 1
    fields = [(blocks >> shift & mask).to(torch.uint8) for shift in range(0, 32, bits)]
    return torch.cat(fields, 2).flatten(1)[:, :k]


def beside(matrix: Coded) -> Coded:
    """The same, each zero behind its scale, if that has 16 bits and zeros are small integers."""
    scale, zero = matrix.scale, matrix.zero
    if zero is None or scale.itemsize != 2 or zero.is_floating_point():
        return matrix
    if int(zero.min()) < -100 or int(zero.max()) > 100:  # with 136 more still exact in bf16
        return matrix
    both = torch.stack([scale, zero.to(scale.dtype)], -1)
    return matrix._replace(scale=both[..., 0], zero=both[..., 1])


def linear(
    x: torch.Tensor,
    matrix: Coded,
    *,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
    gated: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] · matrix [N, K] transposed + bias [N] + add [M, N] -> [M, N] in x's dtype.

    `norm`, `eps`, `act`, `gated`, `out`: as in `skinny.linear`. Sums are in fp32. Whether values
    are rounded to x's dtype before they are multiplied depends on the form that a kernel takes;
    here they are not. `matrix.order` is not looked at: x has the order of the codes.
    """
    row = x.float()
    if norm is not None:
        row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps) * norm
    if act is not None:
        gate, up = row.chunk(2, -1)
        row = activate(gate, act) * up
    y = row.to(x.dtype).float() @ dequantise(matrix._replace(order=None), torch.float32).t()
    for term in (bias, add):
        if term is not None:
            y = y + term.float()
    if gated is not None:
        gate, up = y.chunk(2, -1)
        y = activate(gate, gated) * up
    return y.to(x.dtype) if out is None else out.copy_(y)


def serves(m: int, matrix: Coded) -> bool:
    """Whether `linear` takes so many rows in one go: never, of the twin."""
    return False


def dequantise(matrix: Coded, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The matrix [N, K], each value rounded once to `dtype`."""
    n = len(matrix.codes)
    if out is None:
        out = torch.empty((n, matrix.columns), dtype=dtype, device=matrix.codes.device)
    step = max(1, _PIECE // max(matrix.columns, 1))
    for at in range(0, n, step):
        rows = slice(at, at + step)
        values = _values(matrix, rows)
        if matrix.order is None:
            out[rows] = values
        else:
            out[rows, matrix.order] = values.to(dtype)
    return out


def rows(matrix: Coded, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows `ids` [n] of the matrix as `dequantise` makes them, [n, K]."""
    zero = None if matrix.zero is None else matrix.zero[ids]
    codes = matrix.codes.view(torch.uint8)[ids].view(matrix.codes.dtype)  # e4m3 has no index
    return dequantise(matrix._replace(codes=codes, scale=matrix.scale[ids], zero=zero), dtype)


def _values(matrix: Coded, rows: slice) -> torch.Tensor:
    """Some rows in fp32, columns as the codes have them."""
    codes, k = matrix.codes[rows], matrix.columns
    if codes.dtype is torch.int32:
        fields, table = unpack(codes, k, matrix.bits), matrix.table
        middle = 1 << (matrix.bits - 1)
        values = fields.float() - middle if table is None else table[fields.int()]
    else:
        values = codes.float()
    if matrix.zero is not None:
        values -= _spread(matrix.zero[rows].float(), matrix.group, k)
    return values.mul_(_spread(matrix.scale[rows].float(), matrix.group, k))


def _spread(groups: torch.Tensor, size: int, k: int) -> torch.Tensor:
    """One value for each column [N, K] (or [N, 1]) from those of groups."""
    return groups if groups.shape[1] == 1 else groups.repeat_interleave(size, 1)[:, :k]
