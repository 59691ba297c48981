"""Codes out of the words they are packed in, cut for this rank."""

from typing import TYPE_CHECKING

import torch

from kvrun.errors import BadCheckpoint
from kvrun.runtime.source import Ranges

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint

_WORD = 32  # bits
Pair = tuple[Ranges | None, Ranges | None]


def unpack(words: torch.Tensor, bits: int, order: tuple[int, ...] = ()) -> torch.Tensor:
    """int32 [..., W] -> uint8 [..., W · 32 / bits], the lowest bits of a word first.

    Values of 3 bits run on from one word to the next. With `order` the i-th value of a word
    stands at place order[i].
    """
    if bits == 3:
        parts = words.reshape(*words.shape[:-1], -1, 3).long() & 0xFFFFFFFF
        low, middle, high = parts.unbind(-1)
        # Value 10 has bits 30 to 32 of the row of 96, value 21 bits 63 to 65.
        ends = (low | (middle & 0xFFFF) << 32, middle >> 16 | high << 16)
        places = torch.arange(0, 48, 3, device=words.device)
        values = torch.cat([end.unsqueeze(-1) >> places for end in ends], -1)
        return (values & 7).to(torch.uint8).flatten(-2)
    shifts = [bits * i for i in range(_WORD // bits)]
    if order:
        shifts = [shifts[order.index(place)] for place in range(len(order))]
    mask = (1 << bits) - 1
    out = torch.empty((*words.shape, len(shifts)), dtype=torch.uint8, device=words.device)
    for place, shift in enumerate(shifts):
        out[..., place] = words >> shift & mask
    return out.flatten(-2)


def packed(
    w: "Checkpoint",
    name: str,
    shape: tuple[int, int],
    cut: Pair,
    dim: int,
    bits: int,
    order: tuple[int, ...] = (),
    stored: int | None = None,
) -> torch.Tensor:
    """The kept codes, uint8, of a matrix of codes `shape` that is packed along `dim`.

    `stored`: words along `dim` where rows are padded.
    """
    codes, words = (32, 3) if bits == 3 else (_WORD // bits, 1)
    whole = list(shape)
    whole[dim] = stored or -(-shape[dim] // codes) * words
    covering = list(cut)
    ranges = cut[dim]
    if ranges is not None:
        covering[dim] = tuple((a // codes * words, -(-b // codes) * words) for a, b in ranges)
    found = w.read(name, (whole[0], whole[1]), covering, torch.int32)
    values = unpack(found if dim else found.t(), bits, order)
    values = trim(values, ranges, codes) if ranges is not None else values[:, : shape[dim]]
    return values if dim else values.t()


def halves(
    w: "Checkpoint",
    name: str,
    shape: tuple[int, int],
    cut: Pair,
    dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """The kept codes of a matrix `shape` with two of them in a byte, the lower half first."""
    rows, cols = cut
    covering = None if cols is None else tuple((a // 2, -(-b // 2)) for a, b in cols)
    found = w.read(name, (shape[0], -(-shape[1] // 2)), (rows, covering), dtype)
    found = found.view(torch.uint8)
    values = torch.stack([found & 15, found >> 4], 2).flatten(1)
    return values[:, : shape[1]] if cols is None else trim(values, cols, 2)


def trim(values: torch.Tensor, ranges: Ranges, unit: int) -> torch.Tensor:
    """What `ranges` keep of columns that were read in whole units."""
    parts, at = [], 0
    for first, last in ranges:
        start = at + first % unit
        parts.append(values[:, start : start + last - first])
        at += (-(-last // unit) - first // unit) * unit
    return torch.cat(parts, 1)


def groups_of(w: "Checkpoint", size: int, group: int, cols: Ranges | None) -> torch.Tensor:
    """int64: which group of `group` columns each kept one of `size` columns belongs to."""
    index = torch.arange(size, device=w.device) // group
    return index if cols is None else torch.cat([index[a:b] for a, b in cols])


def bits_of(name: str, words: int, columns: int, said: int, known: tuple[int, ...]) -> int:
    """How many bits a code has when `columns` of them take so many words of 32 bits: those `said`
    where they fit, as of few columns others may too.

    Raises BadCheckpoint when they do not make codes of a `known` number of bits.
    """
    for bits in sorted(known, key=lambda bits: bits != said):
        per, unit = (32, 3) if bits == 3 else (_WORD // bits, 1)
        if -(-columns // per) * unit == words:
            return bits
    raise BadCheckpoint(
        f"the packed weights of {name} do not fit its config.json.",
        cause=f"{columns} values lie in {words} words of 32 bits; known are codes of "
        f"{', '.join(map(str, known))} bits",
        hint="fetch the model again, or check that config.json belongs to these weights",
    )
