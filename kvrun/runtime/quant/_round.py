"""Plain matrices into codes, each value to the nearest: what is done without any text to look at.

Scales are rounded to their dtype before codes are chosen, so that codes are the best for them.
Work is done some rows at a time, in fp32.
"""

from collections.abc import Iterator, Sequence
from math import gcd
from typing import TYPE_CHECKING, NamedTuple, cast

import torch

from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.kernels.w4a16 import Coded
from kvrun.runtime.quant import _coded
from kvrun.runtime.quant._tables import TABLES

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.quant import TableWeight, Weight

GROUP = 128  # columns that share a scale of 4-bit codes
BLOCK = 64  # the same, of codes of a table
LARGEST = 448.0  # of e4m3
# Values that are worked on at once, on a GPU and on CPU, where large pieces of memory come from the
# system anew each time, and small ones stay in a cache.
_PIECE, _CPU_PIECE = 1 << 24, 1 << 18
# Shares of a group's range that its scale may cover: the one with the least squared error is taken.
_SHRINK = (1.0, 0.95, 0.9, 0.85)
_ROUTERS = ("gate", "router", "shared_expert_gate")


class Codes(NamedTuple):
    """(code - zero) · scale: uint8 [N, K], scales and zeros [N, G]; no zero: half the range."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]

    def values(self) -> torch.Tensor:
        """fp32 [N, K]."""
        zero = float(1 << (self.bits - 1)) if self.zero is None else self.zero.float()[..., None]
        codes = self.codes.float().view(len(self.codes), -1, self.group)
        values: torch.Tensor = (codes - zero) * self.scale.float()[..., None]
        return values.flatten(1)


def read(w: "Checkpoint", shards: Sequence[Shard], bias: bool) -> "Weight":
    """Plain matrices, rounded to `w.quantize` as they are read; routers stay plain."""
    return _coded.read(w, shards, bias, decode)


def head(
    w: "Checkpoint", weight: torch.Tensor, bias: torch.Tensor | None
) -> "tuple[TableWeight, int] | None":
    """What makes logits, `weight` [vocab, hidden], in 8 bits whatever the method, and its bytes.

    None where it stays as it is: no rounding is asked for, or the device would have to turn it back
    into plain values.
    """
    if w.quantize is None or w.reader is not None:
        return None
    method = "fp8" if w.quantize == "fp8" else "int8"
    if method == "fp8" and w.device.type == "cpu":
        return None
    found = _coded.keep(coded(weight, method), w.dtype, bias)
    return None if found is None else (cast("TableWeight", found), found.nbytes)


def decode(w: "Checkpoint", shard: Shard) -> Coded | None:
    if w.quantize is None or stays(shard):
        return None
    return coded(w.matrix(shard), w.quantize)


def stays(shard: Shard) -> bool:
    """Whether a matrix is left as it is: those outside of all layers, and routers of experts."""
    parts = shard.name.split(".")
    routes = any(part in _ROUTERS for part in parts[-2:])
    return routes or not any(part.isdigit() for part in parts)


def coded(weight: torch.Tensor, method: str) -> Coded:
    """A matrix [N, K] in one of `config.QUANTIZE`."""
    k = weight.shape[1]
    if method in TABLES:
        size = fitting(k, BLOCK)
        codes, scale, table = by_table(weight, method, size)
        return _coded.grouped(codes, scale, _groups(weight, size), table=table)
    if method == "fp8":
        codes, scale = e4m3(weight)
        return _coded.grouped(codes, scale, _groups(weight, k))
    size = fitting(k, GROUP) if method == "int4" else k
    made = whole(weight, 4 if method == "int4" else 8, size, symmetric=method == "int8")
    return _coded.affine(made.codes, made.scale, made.zero, made.bits, _groups(weight, size))


def fitting(k: int, group: int) -> int:
    """The group nearest to `group` that cuts `k` columns evenly; all of them where none does."""
    size = gcd(k, group)
    return size if size >= 32 else k


def _groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    return torch.arange(weight.shape[1], device=weight.device) // max(size, 1)


def whole(
    weight: torch.Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool,
    clip: bool = True,
    importance: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Codes:
    """Integers with a scale, and a zero unless `symmetric`, for `group` columns, which divides K.

    Scales are kept in `dtype`, by default the matrix's. With `clip` ranges of less than 8 bits are
    narrowed where that lowers the squared error, weighed for each column by `importance` [K].
    """
    made = [
        _whole(
            rows.view(len(rows), -1, group),
            bits,
            symmetric,
            clip,
            importance,
            dtype or weight.dtype,
        )
        for rows in _pieces(weight)
    ]
    zeros = [zero for _, _, zero in made if zero is not None]
    return Codes(
        torch.cat([codes for codes, _, _ in made]).flatten(1),
        torch.cat([scale for _, scale, _ in made]),
        torch.cat(zeros) if zeros else None,
        bits,
    )


def _whole(
    x: torch.Tensor,
    bits: int,
    symmetric: bool,
    clip: bool,
    importance: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Of x [N, G, group]: codes, scales [N, G], zeros [N, G]."""
    weigh = 1.0 if importance is None else importance.view(1, x.shape[1], -1)
    best: torch.Tensor | None = None
    shares = _SHRINK if clip and bits < 8 else _SHRINK[:1]
    for share in shares:
        scale, zero = grid(x, bits, symmetric, share, dtype)
        codes = ((x / scale).round_() + zero).clamp_(0, (1 << bits) - 1)
        if len(shares) == 1:
            found = (codes, scale, zero)
            break
        error = ((codes - zero) * scale).sub_(x).square_().mul_(weigh).sum(-1, keepdim=True)
        if best is None:
            best, found = error, (codes, scale, zero)
        else:
            better = error < best
            best = torch.where(better, error, best)
            pairs = zip((codes, scale, zero), found, strict=True)
            found = tuple(torch.where(better, new, old) for new, old in pairs)  # type: ignore[assignment]
    codes, scale, zero = found
    kept = None if symmetric else zero.squeeze(-1).to(torch.uint8)
    return codes.to(torch.uint8), scale.squeeze(-1).to(dtype), kept


def grid(
    x: torch.Tensor, bits: int, symmetric: bool, share: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero [..., 1] in fp32, the scale as `dtype` holds it, for `share` of x's range."""
    top = (1 << bits) - 1
    if symmetric:
        scale = x.abs().amax(-1, keepdim=True) * (2 * share / top)
        scale = _kept(scale, dtype)
        return scale, torch.full_like(scale, 1 << (bits - 1))
    low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
    scale = _kept((high - low) * (share / top), dtype)
    return scale, (-low * share / scale).round_().clamp_(0, top)


def _kept(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A scale as it will be stored, and above 0."""
    least = torch.finfo(dtype).tiny
    return scale.clamp_(min=least).to(dtype).float()


def e4m3(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn [N, K] and a scale for each row [N, 1] in the matrix's dtype."""
    made = []
    for rows in _pieces(weight):
        scale = _kept(rows.abs().amax(1, keepdim=True) / LARGEST, weight.dtype)
        codes = (rows / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        made.append((codes, scale.to(weight.dtype)))
    codes = torch.cat([codes.view(torch.uint8) for codes, _ in made])
    return codes.view(torch.float8_e4m3fn), torch.cat([scale for _, scale in made])


def by_table(
    weight: torch.Tensor, kind: str, size: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K], scales fp32 [N, K / size] and the table, fp32 [16]."""
    table = torch.tensor(TABLES[kind], device=weight.device)
    points, order = table.sort()
    middles = (points[1:] + points[:-1]) / 2
    made = []
    for rows in _pieces(weight):
        blocks = rows.view(len(rows), -1, size)
        scale = blocks.abs().amax(-1, keepdim=True)
        near = torch.bucketize(blocks / scale.clamp(min=1e-30), middles)
        made.append((order[near].to(torch.uint8).flatten(1), scale.squeeze(-1)))
    return torch.cat([codes for codes, _ in made]), torch.cat([scale for _, scale in made]), table


def _pieces(weight: torch.Tensor) -> "Iterator[torch.Tensor]":
    """Rows of a matrix in fp32."""
    size = _CPU_PIECE if weight.device.type == "cpu" else _PIECE
    step = max(1, size // max(weight.shape[1], 1))
    for at in range(0, len(weight), step):
        yield weight[at : at + step].float()
