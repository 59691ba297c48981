"""Low-rank changes of many adapters to one product, in Triton; twin: kernels/lora.py.

Two launches for a product, whatever parts it has and whatever adapters and ranks its rows have.
`shrink` cuts the input among programs and leaves fp32 sums of its pieces, which `expand` adds in
their order, so that equal inputs give equal bits. Programs are laid out for as many tiles as there
can be, and those without work end early or, in `expand`, help: a captured step serves any mix. Both
kernels read their adapter's first matrix, which no step writes, before they wait for the kernel in
front of them.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.lora import CROWD
from kvrun.runtime.kernels.triton._device import sm_count
from kvrun.runtime.kernels.triton._lora_expand import _dot, _expand
from kvrun.runtime.kernels.triton._lora_stream import _expand_stream
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait

RANKS = 16  # of a block: the least that tensor cores multiply
_FEW_TILES = 16  # up to which the input is cut as finely as it goes
_TALL = 16  # rows of a tile beyond which it is a prompt's
_MOST_PIECES = 32
_COUNTED = 128  # tiles that are counted on the device; a step with room for more has work for all
_PROMPT = 128  # outputs of a program where tiles are tall
_FEWEST_PIECES = 8  # where many rows may be few tiles: all of one adapter


class Stream(NamedTuple):
    """How `expand` goes through B: `turns` (a power of 2) tiles of `block_n` outputs a program, all
    behind the first asked for `ahead` of everything else. `registers` of a thread at most; None
    leaves that to the compiler."""

    turns: int
    block_n: int
    warps: int = 4
    ahead: bool = True
    registers: int | None = None


# Measured on an H100 with the products of Llama 3 8B, 1 to 64 rows: few tiles of many rows, tiles
# of one row or few, and so many of these that there is work for all without cutting it finely.
_CROWDED = Stream(4, 512)
_APART = Stream(1, 256, ahead=False, registers=80)
_MANY = Stream(2, 512, warps=2, ahead=False)


def shrink(
    x: torch.Tensor, arena: torch.Tensor, table: torch.Tensor, rows: torch.Tensor,
    tiles: torch.Tensor, *, height: int, features: int, width: int,
    norm: torch.Tensor | None = None, parts: int = 1,
) -> torch.Tensor:  # fmt: skip
    """As the twin."""
    block_m = max(16, triton.next_power_of_2(height))
    block_k, span, pieces = _cut(len(tiles), parts, features, block_m, sm_count(x.device))
    sums = torch.empty((pieces, len(rows), width + 1), device=x.device)
    if len(tiles) and len(rows):
        _shrink[(len(tiles), parts, pieces)](
            x, norm, arena, table, rows, tiles, sums,
            len(rows), x.stride(0), table.stride(0), width + 1, span, parts,
            K=features, BLOCK_M=block_m, BLOCK_K=block_k, BLOCK_R=RANKS, SINGLE=span == block_k,
            NORM=norm is not None,
            # Triton's interpreter multiplies the bits of bf16 as integers.
            WIDE=x.device.type == "cpu", num_warps=4, **overlap(x.device),
        )  # fmt: skip
    return sums


def expand(
    sums: torch.Tensor, y: torch.Tensor, arena: torch.Tensor, table: torch.Tensor,
    rows: torch.Tensor, tiles: torch.Tensor, *, height: int, features: int, outs: Sequence[int],
    eps: float | None = None,
) -> None:  # fmt: skip
    """As the twin."""
    pieces, count, width = sums.shape
    if not len(tiles) or not count:
        return
    block_m = max(16, triton.next_power_of_2(height))
    stream = _form(len(tiles), count, block_m)
    block_n = stream.block_n if stream else _PROMPT
    span = block_n * stream.turns if stream else block_n
    places = _places(tuple(outs), span, y.device)
    where = (
        sums, y, arena, table, rows, tiles, places, len(tiles), len(places),
        count, y.stride(0), table.stride(0), width, pieces, 1.0 / features, eps or 0.0,
    )  # fmt: skip
    options = {
        "CHUNK": _chunk(pieces, block_m), "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": RANKS,
        "NORM": eps is not None,
        "ALIGNED": all(out % 8 == 0 for out in outs), "WIDE": y.device.type == "cpu",
        **overlap(y.device),
    }  # fmt: skip
    grid = (len(tiles) * len(places),)
    if stream:
        ahead = 32 * stream.warps if stream.ahead and y.device.type == "cuda" else 0
        limit = {"maxnreg": stream.registers} if stream.registers else {}
        _expand_stream[grid](
            *where, **options, TURNS=stream.turns, THREADS=ahead,
            COUNTED=_COUNTED, num_warps=stream.warps, **limit,
        )  # fmt: skip
    else:
        _expand[grid](*where, **options, num_warps=4)


# What differs between sizes of a step is no constant: each would have to be compiled. `span` is
# specialized for what it is a multiple of, without which loads would be by the element.
@triton.jit(do_not_specialize=["count", "width", "every"])
def _shrink(
    x, norm, arena, table, rows, tiles, sums, count, x_stride, table_stride, width,
    span, every, K: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    NORM: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one tile of rows, every `every`-th block of ranks, over `span` columns of the input."""
    release(PDL)
    tile, first_block, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(tiles + 3 * tile)
    entry = table + slot.to(tl.int64) * table_stride
    rank = tl.load(entry + 1).to(tl.int32)
    if first_block * BLOCK_R >= rank:
        wait(PDL)  # a kernel that waits for nobody would let the next one start too early
        return
    first, tall = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    m, r = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    row = tl.load(rows + first + m, mask=m < tall, other=0).to(tl.int64)
    k = piece * span + tl.arange(0, BLOCK_K)
    a_at = arena + tl.multiple_of(tl.load(entry), 8) + r[:, None] * K + k[None, :]
    if tall == 1:
        _shrink_row(
            x, norm, a_at, rows, sums, first_block, rank, first, piece, k, r, count, x_stride,
            width, span, every, K, BLOCK_K, BLOCK_R, NORM, PDL,
        )  # fmt: skip
        return
    x_at = x + row[:, None] * x_stride + k[None, :]
    sums += (piece * count + first + m)[:, None].to(tl.int64) * width
    blocks = tl.cdiv(rank, BLOCK_R)
    if SINGLE:
        inside = (k < K)[None, :]
        a = tl.load(
            a_at + first_block * BLOCK_R * K,
            mask=(first_block * BLOCK_R + r < rank)[:, None] & inside,
            other=0.0,
        )
        wait(PDL)
        part, square = _row(x_at, norm, k, (m < tall)[:, None] & inside, inside, NORM)
        if NORM and first_block == 0:
            tl.store(sums + width - 1, square[:, None], mask=(m < tall)[:, None])
        for block in range(first_block, blocks, every):
            y = _dot(part.to(a.dtype), a, tl.zeros([BLOCK_M, BLOCK_R], tl.float32), WIDE)
            ranks = block * BLOCK_R + r
            tl.store(sums + ranks[None, :], y, mask=(m < tall)[:, None] & (ranks < rank)[None, :])
            later = ranks + every * BLOCK_R < rank
            following = a_at + (block + every) * BLOCK_R * K
            a = tl.load(following, mask=later[:, None] & inside, other=0.0)
    else:
        wait(PDL)
        for block in range(first_block, blocks, every):
            ranks = block * BLOCK_R + r
            y, squares = _sweep(
                x_at, a_at + block * BLOCK_R * K, norm, k, (m < tall)[:, None],
                (ranks < rank)[:, None], span, K, BLOCK_M, BLOCK_K, BLOCK_R, NORM, WIDE,
            )  # fmt: skip
            tl.store(sums + ranks[None, :], y, mask=(m < tall)[:, None] & (ranks < rank)[None, :])
            if NORM and block == 0:
                tl.store(sums + width - 1, squares[:, None], mask=(m < tall)[:, None])


@triton.jit
def _sweep(
    x_at, a_at, norm, k, alive, there, span, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    NORM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One block of ranks over `span` columns, in several turns; sums of squares of the rows."""
    y = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    squares = tl.zeros([BLOCK_M], tl.float32)
    for k0 in tl.range(0, span, BLOCK_K, num_stages=3):
        inside = (k0 + k < K)[None, :]
        a = tl.load(a_at + k0, mask=there & inside, other=0.0)
        part, square = _row(x_at + k0, norm, k0 + k, alive & inside, inside, NORM)
        y = _dot(part.to(a.dtype), a, y, WIDE)
        squares += square
    return y, squares


@triton.jit
def _shrink_row(
    x, norm, a_at, rows, sums, first_block, rank, first, piece, k, r, count, x_stride, width,
    span, every, K: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same for a tile of one row, by multiply and add."""
    ranks = first_block * BLOCK_R + r
    a = tl.load(
        a_at + first_block * BLOCK_R * K, mask=(ranks < rank)[:, None] & (k < K)[None, :], other=0.0
    )
    row = tl.load(rows + first).to(tl.int64)
    at = sums + (piece * count + first).to(tl.int64) * width
    wait(PDL)
    for block in range(first_block, tl.cdiv(rank, BLOCK_R), every):
        ranks = block * BLOCK_R + r
        y = tl.zeros([BLOCK_R], tl.float32)
        squares = 0.0
        for k0 in range(0, span, BLOCK_K):
            # The next matrix is on its way while this one is multiplied.
            onward = k0 + BLOCK_K < span
            next_k = tl.where(onward, k0 + BLOCK_K, 0)
            next_block = tl.where(onward, block, block + every)
            following = tl.load(
                a_at + next_block * BLOCK_R * K + next_k,
                mask=(next_block * BLOCK_R + r < rank)[:, None] & (next_k + k < K)[None, :],
                other=0.0,
            )
            inside = k0 + k < K
            part = tl.load(x + row * x_stride + k0 + k, mask=inside, other=0.0)
            if NORM:
                part = part.to(tl.float32)
                squares += tl.sum(part * part)
                part = part * tl.load(norm + k0 + k, mask=inside, other=0.0)
            part = part.to(a.dtype).to(tl.float32)
            y += tl.sum(part[None, :] * a.to(tl.float32), 1)
            a = following
        tl.store(at + ranks, y, mask=ranks < rank)
        if NORM and block == 0:
            tl.store(at + width - 1, squares)


@triton.jit
def _row(at, norm, k, alive, inside, NORM: tl.constexpr):
    """Pieces of rows as they enter the product, and sums of their squares before the norm."""
    x = tl.load(at, mask=alive, other=0.0)
    square = tl.zeros([x.shape[0]], tl.float32)
    if NORM:
        x = x.to(tl.float32)
        square = tl.sum(x * x, 1)
        x = x * tl.load((norm + k)[None, :], mask=inside, other=0.0)
    return x, square


def _cut(tiles: int, parts: int, k: int, block_m: int, sm_count: int) -> tuple[int, int, int]:
    """Columns of a turn, columns of a program, and how many programs share the input."""
    most = 64 if block_m > _TALL else 256 if k <= 8192 else 512
    block_k = max(16, min(most, triton.next_power_of_2(k)))
    turns = triton.cdiv(k, block_k)
    wanted = max(triton.cdiv(2 * sm_count, tiles * parts), _FEWEST_PIECES)
    if tiles <= _FEW_TILES:
        wanted = _MOST_PIECES  # a program that has one turn waits for memory once
    span = triton.cdiv(turns, min(wanted, _MOST_PIECES)) * block_k
    return block_k, span, triton.cdiv(k, span)


def _form(tiles: int, rows: int, block_m: int) -> Stream | None:
    """How `expand` goes through B; None: a tile of prompts at a time."""
    if block_m > _TALL:
        return None
    if CROWD * tiles <= rows:
        return _CROWDED
    return _MANY if tiles > 32 else _APART


def _chunk(pieces: int, block_m: int) -> int:
    """Pieces that are loaded at once."""
    if block_m > _TALL:
        return 2
    return 8 if pieces <= 8 else 16 if pieces <= 16 else 32


@cache
def _places(outs: tuple[int, ...], block_n: int, device: torch.device) -> torch.Tensor:
    """[programs, 4] int32: the part of each, its first output in it, the part's size and column."""
    found, column = [], 0
    for part, out in enumerate(outs):
        found += [(part, n0, out, column) for n0 in range(0, out, block_n)]
        column += out
    return torch.tensor(found, dtype=torch.int32, device=device)
