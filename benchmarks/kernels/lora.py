"""Time of the LoRA kernels at the sizes of Llama 3 8B, rank 16, beside reading the adapters once.

`python benchmarks/kernels/lora.py [--pieces 4 8]`. Each line is one product of
a layer with so many rows on so many adapters, in a captured step of 8 layers, each with adapters of
its own: microseconds of both kernels together, of each, and what the bytes take at 3.2 TB/s.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu  # beside this file
import numpy as np
import torch

from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.kernels.lora import CROWD
from kvrun.runtime.kernels.triton import lora
from kvrun.runtime.lora.rows import tiled
from kvrun.runtime.lora.sites import Sites

RANK, LAYERS, RATE = 16, 8, 3.2e12
PRODUCTS = {
    "qkv": ((4096, 1024, 1024), 4096, "norm"),
    "o": ((4096,), 4096, ""),
    "gate_up": ((14336, 14336), 4096, "norm"),
    "down": ((4096,), 14336, ""),
}
CASES = ((1, 1), (8, 1), (8, 8), (32, 32), (64, 1), (64, 64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pieces", nargs="+", type=int, default=[lora._FEWEST_PIECES])
    args = parser.parse_args()
    gpu.needed()
    for pieces in args.pieces:
        lora._FEWEST_PIECES = pieces
        print(f"at least {pieces} pieces of the input")
        for rows, adapters in CASES:
            print(f"{rows:3}/{adapters:2}", *(measure(n, rows, adapters) for n in PRODUCTS))


@dataclass
class Case:
    """One product of `layers` layers, each with adapters of its own, and a step's rows."""

    name: str
    rows: int
    adapters: int
    layers: int = LAYERS

    def __post_init__(self) -> None:
        self.outs, k, before = PRODUCTS[self.name]
        sites = Sites([tuple(Shard(str(p), out, k) for p, out in enumerate(self.outs))])
        layout = sites.lay_out({(0, p): RANK for p in range(len(self.outs))})
        table = np.concatenate([np.zeros((1, sites.width))] + [layout.table] * self.adapters)
        for slot in range(1, self.adapters + 1):
            start = (slot - 1) * layout.size
            table[slot, 0] += start
            table[slot, 2::3] += start
        found = tiled(np.array([1 + row % self.adapters for row in range(self.rows)]), 16)
        listed, tiles = (torch.from_numpy(part).cuda() for part in found)
        few = len(tiles) <= self.rows // CROWD  # as in a captured step
        most = self.rows // CROWD if few else self.rows
        room = torch.zeros(most, 3, dtype=torch.int32, device="cuda")
        room[: len(tiles)] = tiles
        bf16: Any = {"device": "cuda", "dtype": torch.bfloat16}
        self.arenas = torch.randn(self.layers, layout.size * self.adapters, **bf16)
        self.where = torch.from_numpy(table).long().cuda(), listed, room
        fused = self.rows <= 16
        self.norm = torch.ones(k, device="cuda") if before == "norm" and fused else None
        self.x = torch.randn(self.rows, k, **bf16)
        self.y = torch.zeros(self.rows, sum(self.outs), **bf16)
        self.sizes = {"height": 16, "features": k}
        self.least = self.adapters * layout.size * 2 / RATE * 1e6

    def shrink(self, arena: torch.Tensor) -> torch.Tensor:
        return lora.shrink(
            self.x, arena, *self.where, **self.sizes, width=256, norm=self.norm,
            parts=len(self.outs),
        )  # fmt: skip

    def expand(self, arena: torch.Tensor, low: torch.Tensor) -> None:
        eps = None if self.norm is None else 1e-5
        lora.expand(low, self.y, arena, *self.where, **self.sizes, outs=self.outs, eps=eps)


def measure(name: str, rows: int, adapters: int) -> str:
    case = Case(name, rows, adapters)
    sums = case.shrink(case.arenas[0])
    both = micros(lambda arena: case.expand(arena, case.shrink(arena)), case.arenas)
    parts = micros(case.shrink, case.arenas), micros(lambda a: case.expand(a, sums), case.arenas)
    return f"{name} {both:6.1f} ({parts[0]:5.1f} + {parts[1]:5.1f}, bytes {case.least:5.1f})"


def micros(run: Callable[[torch.Tensor], object], arenas: torch.Tensor) -> float:
    """Per call, captured."""
    for arena in arenas[:2]:
        run(arena)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arena in arenas:
            run(arena)
    times = []
    for _ in range(8):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(arenas))
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()
