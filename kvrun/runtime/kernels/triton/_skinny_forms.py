"""How products of few rows are cut, for `skinny.py`.

Measured on an H100 by turns: each product of a layer in many forms while the others stood still, in
a graph of all layers one after the other (`benchmarks/kernels/skinny_chain.py`). What is fastest
there is not what is fastest alone. A kernel is launched while the one in front of it still runs, so
it gains by what it can ask for before it waits, best all of its weights, and by leaving room for
the programs of the next: few programs, each with much in flight.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

_LARGE = 1 << 24  # elements of a matrix whose programs do not all run at once


class Form(NamedTuple):
    """How a product is cut: see `config`."""

    dot: bool  # tensor cores, else multiply-add
    block_n: int  # outputs of a program
    block_k: int  # columns per turn of its loop
    warps: int
    stages: int  # weight tiles in flight; of `fma` 0: the first before it waits, one ahead
    splits: int = 1  # programs that share K, of `dot`
    ahead: int = 0  # columns of its weights that a program asks into L2 before it waits
    early: bool = True  # the next kernel may start as soon as all programs of this one have


@cache
def config(
    m: int, n: int, k: int, dtype: torch.dtype, sm_count: int, room: int, *, overlap: bool
) -> Form:
    """The form that was fastest on a device of this kind, or the nearest to it. `room`: bytes of
    its shared memory; `overlap`: its kernels are launched ahead of time."""
    wide = dtype is torch.float32
    if m <= (8 if wide else 4):
        return _fma_overlapping(m, n, k, sm_count) if overlap and not wide else _fma(n, k, sm_count)
    if wide:
        return Form(True, 32, 32, 4, 2)
    block_k = 128 if k >= 128 else max(16, triton.next_power_of_2(k))
    tiles = triton.cdiv(n, 64)
    if m > 16:
        return _dot_of_many(m, n, k, sm_count, room, block_k)
    stages = 4
    if overlap:
        programs, columns = sm_count, 4 * block_k
        if tiles <= sm_count and room >= 150 << 10:
            stages = 6
    else:
        programs, columns = 4 * sm_count, 2 * block_k
    splits = max(1, min(k // columns, programs // tiles, 8))
    return Form(True, 64, block_k, 4, stages, splits, ahead=2 * block_k)


def _fma(n: int, k: int, sm_count: int) -> Form:
    """Multiply-add, for kernels that wait for one another before they start."""
    warps = min(4, max(1, triton.next_power_of_2(k) // 256))
    block_n = _outputs(4, n, 2 * sm_count)
    # A large product has other programs to wait beside; a small one carries its next tile.
    return Form(False, block_n, 256 * warps, warps, int(n * k > 1 << 25))


def _fma_overlapping(m: int, n: int, k: int, sm_count: int) -> Form:
    """Multiply-add of 16 bits, for kernels that are launched ahead of time: a row in one turn,
    where its programs find room side by side."""
    if k <= 1024:
        if k > 512 and n <= 32 * sm_count:
            return Form(False, _outputs(4 if m == 1 else 2, n, 2 * sm_count), 1024, 2, 0)
        block_k = min(512, max(256, triton.next_power_of_2(k)))
        return Form(False, _outputs(4, n, 2 * sm_count), block_k, 1, 0)
    # Too much of a second turn would be empty.
    short = 2048 * triton.cdiv(k, 2048) > 1.5 * k
    if n * k <= _LARGE:
        if short:
            return Form(False, 4, 1024, 2, 0) if m == 1 else Form(False, 2, 512, 1, 0)
        return Form(False, _outputs(4 if m == 1 or k > 2048 else 2, n, sm_count), 2048, 8, 0)
    if m == 1 and not short:
        return Form(False, 4 if k > n else 2, 2048, 8, 0)
    if k < 4096:
        return Form(False, 2, 1024, 4, 0)
    return Form(False, 4, 1024, 4, 1) if k > n else Form(False, 8, 1024, 4, 0)


def _outputs(most: int, n: int, programs: int) -> int:
    """Of a program, `most` or fewer, so that there are so many programs."""
    while most > 1 and n < most * programs:
        most //= 2
    return most


def _dot_of_many(m: int, n: int, k: int, sm_count: int, room: int, block_k: int) -> Form:
    """Tensor cores, for 17 to 64 rows."""
    tiles = triton.cdiv(n, 64)
    splits = 1
    if k > 4096 or 4 * tiles <= sm_count:
        programs = sm_count if m > 32 else 2 * sm_count
        splits = max(1, min(k // (4 * block_k), programs // tiles, 4))
    stages = 4
    if m <= 32 and n * k <= 1 << 23 and k >= 128:
        block_k, stages = 64, 6
    elif sm_count < tiles <= 3 * sm_count and k >= 128:
        block_k = 64  # so that three programs find room on a multiprocessor
    elif m > 32 and (tiles > sm_count or room < 128 << 10):
        stages = 3  # two programs
    return Form(True, 64, block_k, 4, stages, splits, ahead=2 * block_k)
