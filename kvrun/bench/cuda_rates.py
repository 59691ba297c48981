"""What this GPU reaches at best: memory, matrix products, launches in a graph, the link to it."""

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear

from kvrun.bench.rates import BANDWIDTH, FLOPS, LINK, TIME, Rate

ROUNDS = 10  # the best counts
COPIED = 4 << 30  # bytes of one side
ROWS, COLS = 28672, 4096  # gate and up of an 8B model
MATRICES = 32  # more than any cache keeps
SIDES = {torch.bfloat16: 8192, torch.float32: 4096}
LAUNCHES = 1000
LINK_BYTES = 256 << 20


def measure(device: torch.device, *, quick: bool, scale: float = 1.0) -> Iterator[Rate]:
    """Rates one by one; `quick`: only those limits are computed from. `scale` shrinks arrays."""
    rounds = 3 if quick else ROUNDS
    with torch.inference_mode(), torch.cuda.device(device):
        # Most of it is free when this runs; a small card gets smaller arrays.
        free = torch.cuda.mem_get_info(device)[0]
        room = int(min(COPIED, free // 4) * scale)
        yield Rate("copy", BANDWIDTH, _copy(room, device, rounds))
        torch.cuda.empty_cache()
        yield Rate("read, bfloat16 GEMV", BANDWIDTH, _gemv(2 * room, device, rounds))
        torch.cuda.empty_cache()
        for dtype, side in SIDES.items():
            rate = _gemm(dtype, max(64, int(side * scale)), device, rounds)
            yield Rate(str(dtype).removeprefix("torch."), FLOPS, rate)
            torch.cuda.empty_cache()
        if not quick:
            yield Rate("kernel in a graph", TIME, _launch(device, rounds))
            yield from _link(int(LINK_BYTES * scale), device, rounds)
    torch.cuda.empty_cache()


def best(run: Callable[[], object], rounds: int) -> float:
    """The least seconds on the device of so many runs, after one that does not count."""
    run()
    seconds = []
    for _ in range(rounds):
        first: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        first.record()
        run()
        last.record()
        last.synchronize()
        seconds.append(float(first.elapsed_time(last)) / 1e3)
    return max(min(seconds), 1e-9)


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`run` as a graph; it runs once before, so that libraries have set themselves up."""
    side: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def _copy(size: int, device: torch.device, rounds: int) -> float:
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / best(lambda: target.copy_(source), rounds)


def _gemv(total: int, device: torch.device, rounds: int) -> float:
    """Bytes/s of a vector times different matrices in one graph."""
    count = max(2, min(MATRICES, total // (ROWS * COLS * 2)))
    matrices = [torch.randn(ROWS, COLS, dtype=torch.bfloat16, device=device) for _ in range(count)]
    x = torch.randn(1, COLS, dtype=torch.bfloat16, device=device)
    out = torch.empty(1, ROWS, dtype=torch.bfloat16, device=device)

    def run() -> None:
        for matrix in matrices:
            torch.mm(x, matrix.t(), out=out)

    graph = captured(run)
    return sum(m.nbytes for m in matrices) / best(graph.replay, rounds)


def _gemm(dtype: torch.dtype, side: int, device: torch.device, rounds: int) -> float:
    """FLOP/s on random values: zeros need less power, and flatter."""
    x, w = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / best(lambda: linear(x, w), rounds)


def _launch(device: torch.device, rounds: int) -> float:
    """Seconds from one nearly empty kernel to the next."""
    value = torch.zeros(1, device=device)

    def run() -> None:
        for _ in range(LAUNCHES):
            value.add_(1.0)

    return best(captured(run).replay, rounds) / LAUNCHES


def _link(size: int, device: torch.device, rounds: int) -> Iterator[Rate]:
    here = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(size, dtype=torch.uint8, device=device)
    seconds = best(lambda: there.copy_(here, non_blocking=True), rounds)
    yield Rate("pinned host to device", LINK, size / seconds)
    seconds = best(lambda: here.copy_(there, non_blocking=True), rounds)
    yield Rate("device to pinned host", LINK, size / seconds)
