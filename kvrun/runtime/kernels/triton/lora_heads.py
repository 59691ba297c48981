"""Low-rank changes to a matrix that is multiplied head by head, in Triton; twin:
kernels/lora_heads.py."""

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._overlap import overlap, release, wait
from kvrun.runtime.kernels.triton._softmax import product

_RANKS = 16  # of a turn: the least that tensor cores multiply


def by_head(
    x: torch.Tensor,
    y: torch.Tensor,
    arena: torch.Tensor,
    table: torch.Tensor,
    rows: torch.Tensor,
    tiles: torch.Tensor,
    *,
    height: int,
    features: int,
    size: int,
    first: int,
    back: bool,
) -> None:
    heads, width = x.shape[1], (x if back else y).shape[2]
    if not len(tiles) or not len(rows):
        return
    _by_head[(len(tiles), heads)](
        x,
        y,
        arena,
        table,
        rows,
        tiles,
        *x.stride()[:2],
        *y.stride()[:2],
        table.stride(0),
        heads * size,
        SIZE=size,
        FIRST=first,
        FEATURES=features,
        WIDTH=width,
        HEIGHT=max(16, triton.next_power_of_2(height)),
        PIECE=64,
        RANKS=_RANKS,
        BACK=back,
        num_warps=4,
        **overlap(x.device),
    )


@triton.jit
def _by_head(
    x_at, y_at, arena, table, rows, tiles, x_stride, x_head, y_stride, y_head, table_stride, out,
    SIZE: tl.constexpr, FIRST: tl.constexpr, FEATURES: tl.constexpr, WIDTH: tl.constexpr,
    HEIGHT: tl.constexpr, PIECE: tl.constexpr, RANKS: tl.constexpr, BACK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One tile of rows and one head: 16 ranks at a time, into them and out of them again."""
    wait(PDL)
    release(PDL)
    tile, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(tiles + 3 * tile)
    entry = table + slot.to(tl.int64) * table_stride
    rank = tl.load(entry + 1).to(tl.int32)
    if (slot == 0) | (rank == 0):
        return
    first, tall = tl.load(tiles + 3 * tile + 1), tl.load(tiles + 3 * tile + 2)
    m = tl.arange(0, HEIGHT)
    alive = m < tall
    row = tl.load(rows + first + m, mask=alive, other=0).to(tl.int64)
    x_at += row * x_stride + head * x_head
    y_at += row * y_stride + head * y_head
    a_at = arena + tl.load(entry)
    b_at = arena + tl.load(entry + 2) + head * SIZE + FIRST
    for r0 in range(0, rank, RANKS):
        ranks = r0 + tl.arange(0, RANKS)
        if BACK:
            low = _into(x_at, alive, b_at, out, ranks, rank, WIDTH, HEIGHT, PIECE, RANKS)
            _out_of(low, y_at, alive, a_at, FEATURES, ranks, rank, FEATURES, PIECE)
        else:
            low = _into(x_at, alive, a_at, FEATURES, ranks, rank, FEATURES, HEIGHT, PIECE, RANKS)
            _out_of(low, y_at, alive, b_at, out, ranks, rank, WIDTH, PIECE)


@triton.jit
def _into(
    x_at, alive, matrix, stride, ranks, rank, COUNT: tl.constexpr, HEIGHT: tl.constexpr,
    PIECE: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Rows [HEIGHT, COUNT] times the transposed rows `ranks` of a matrix."""
    low = tl.zeros([HEIGHT, RANKS], tl.float32)
    for begin in range(0, COUNT, PIECE):
        k = begin + tl.arange(0, PIECE)
        inside = (k < COUNT)[None, :]
        x = tl.load(x_at[:, None] + k[None, :], mask=alive[:, None] & inside, other=0.0)
        at = matrix + ranks.to(tl.int64)[:, None] * stride + k[None, :]
        m = tl.load(at, mask=(ranks < rank)[:, None] & inside, other=0.0)
        low = product(x.to(m.dtype), tl.trans(m), low)
    return low


@triton.jit
def _out_of(
    low, y_at, alive, matrix, stride, ranks, rank, COUNT: tl.constexpr, PIECE: tl.constexpr
):
    """Add low [HEIGHT, RANKS] times the rows `ranks` of a matrix to rows of y."""
    for begin in range(0, COUNT, PIECE):
        k = begin + tl.arange(0, PIECE)
        inside = (k < COUNT)[None, :]
        at = matrix + ranks.to(tl.int64)[:, None] * stride + k[None, :]
        m = tl.load(at, mask=(ranks < rank)[:, None] & inside, other=0.0)
        places, mask = y_at[:, None] + k[None, :], alive[:, None] & inside
        y = tl.load(places, mask=mask, other=0.0).to(tl.float32)
        y = product(low.to(m.dtype), m, y)
        tl.store(places, y.to(y_at.dtype.element_ty), mask=mask)
