"""What this CPU reaches at best, through the operators the engine uses."""

import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear

from kvrun.bench.rates import BANDWIDTH, FLOPS, Rate

ROUNDS = 5  # the best counts
VALUES = 32 << 20  # of float32 in an array: far beyond any cache
SIDE = 2048  # of the matrices that are multiplied
ROWS, COLS = 4096, 4096  # of a matrix that a vector is multiplied with
DTYPES = (torch.float32, torch.bfloat16)


def measure(device: torch.device, *, quick: bool, scale: float = 1.0) -> Iterator[Rate]:
    """Rates one by one. `quick` takes fewer turns; `scale` shrinks arrays."""
    rounds = 2 if quick else ROUNDS
    values, side = int(VALUES * scale), max(16, int(SIDE * scale))
    with torch.inference_mode():
        a, b, c = (torch.ones(values) for _ in range(3))
        seconds = best(lambda: a.copy_(b), rounds)
        yield Rate("copy", BANDWIDTH, 2 * a.nbytes / seconds)
        seconds = best(lambda: torch.add(b, c, alpha=3.0, out=a), rounds)
        yield Rate("triad", BANDWIDTH, 3 * a.nbytes / seconds)
        for dtype in DTYPES:
            rate = _gemv(dtype, values * 4, rounds)
            yield Rate(f"read, {_name(dtype)} GEMV", BANDWIDTH, rate)
        for dtype in DTYPES:
            yield Rate(_name(dtype), FLOPS, _gemm(dtype, side, rounds))


def best(run: Callable[[], object], rounds: int) -> float:
    """The least seconds of so many runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begun)
    return max(min(seconds), 1e-9)


def _gemv(dtype: torch.dtype, total: int, rounds: int) -> float:
    """Bytes/s of a vector times different matrices, `total` bytes of them."""
    rows = max(16, min(ROWS, total // (2 * COLS * dtype.itemsize)))
    count = max(2, total // (rows * COLS * dtype.itemsize))
    matrices = [torch.ones(rows, COLS, dtype=dtype) for _ in range(count)]
    x = torch.ones(1, COLS, dtype=dtype)

    def run() -> None:
        for matrix in matrices:
            linear(x, matrix)

    return sum(m.nbytes for m in matrices) / best(run, rounds)


def _gemm(dtype: torch.dtype, side: int, rounds: int) -> float:
    x, w = (torch.randn(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / best(lambda: linear(x, w), rounds)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
