"""The first half of a layer at one token a sequence: rotation and attention as one kernel or two.

    python benchmarks/kernels/attention_half.py --shape qwen3-0.6b --batch 1 8 16 32 --context 545
    python benchmarks/kernels/attention_half.py --cuts 32,2,4,396,after 64,4,2,264

Layers in a row in one CUDA graph, each with weights and a cache of its own, larger than L2
together: the product of queries, keys and values, `rotate_append` and `decode` or else
`append_and_decode`, and the product behind. Microseconds a layer, the median of 5 runs. Cuts are
keys,warps,stages,programs,early of `_decode.Tiling`, without `early` for two kernels; without cuts
the kernel's own is measured. The fastest stand first.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import gpu  # beside this file
import torch
import torch.nn.functional as F

from kvrun.bench import shapes
from kvrun.runtime.kernels.paged_attention import Options
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.triton import _decode, norm, paged_attention, rotary, skinny
from kvrun.runtime.kernels.triton._decode import Newest, Tiling

PAGE = 16
BF16 = torch.bfloat16
BESIDE_L2 = 256 << 20  # bytes of all layers


class Layer(NamedTuple):
    qkv: torch.Tensor
    out: torch.Tensor
    norm: torch.Tensor
    cache: torch.Tensor
    rotation: Rotation


class Case:
    """Layers of a shape, and a batch of sequences of `context` tokens each."""

    def __init__(self, shape: str, batch: int, context: int) -> None:
        sizes = shapes.SHAPES[shape]
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        dim, hidden = sizes["head_dim"], sizes["hidden_size"]
        self.heads, self.dim, self.batch = heads, dim, batch
        self.options = Options(PAGE, kv_heads, dim, dim**-0.5)
        pages = -(-(context + 1) // PAGE)
        self.tables = torch.randperm(batch * pages).int().view(batch, pages)
        self.lengths = torch.full((batch,), context, dtype=torch.int32)
        last = context - 1
        self.slots = self.tables[:, last // PAGE].long() * PAGE + last % PAGE
        self.x = torch.randn(batch, hidden).to(BF16)
        angles = torch.rand(batch, dim // 2) * 6
        rows, normed = (heads + 2 * kv_heads) * dim, shape.startswith("qwen3")
        each = 2 * (hidden * (rows + heads * dim) + batch * pages * PAGE * 2 * kv_heads * dim)
        of_heads = torch.ones(dim) if normed else None
        self.layers = [
            Layer(
                torch.randn(rows, hidden).to(BF16) * 0.03,
                torch.randn(hidden, heads * dim).to(BF16) * 0.03,
                torch.ones(hidden),
                torch.randn(batch * pages * PAGE, 2 * kv_heads * dim).to(BF16),
                Rotation(angles.cos(), angles.sin(), False, of_heads, of_heads, 1e-6),
            )
            for _ in range(max(6, min(24, BESIDE_L2 // each)))
        ]

    def run(self, attend: Callable[[torch.Tensor, Layer], torch.Tensor]) -> torch.Tensor:
        """All layers, with the products that an engine has at so many rows."""
        x, few = self.x, skinny.takes_in(self.batch, BF16)
        for layer in self.layers:
            if few:
                qkv = skinny.linear(x, layer.qkv, norm=layer.norm, eps=1e-6)
                x = skinny.linear(attend(qkv, layer), layer.out, add=x)
            elif skinny.serves(self.batch, layer.qkv):
                qkv = skinny.linear(norm.rms_norm(x, layer.norm, 1e-6), layer.qkv)
                x = skinny.linear(attend(qkv, layer), layer.out, add=x)
            else:
                x = F.linear(attend(F.linear(x, layer.qkv), layer), layer.out)
        return x

    def attend(self, tiling: Tiling, *, one: bool) -> Callable[[torch.Tensor, Layer], torch.Tensor]:
        kv_heads = self.options.kv_heads

        def run(qkv: torch.Tensor, layer: Layer) -> torch.Tensor:
            q = qkv.view(self.batch, -1, self.dim)[:, : self.heads]
            out = torch.empty(self.batch, self.heads * self.dim, dtype=BF16)
            known = (layer.cache, self.tables, self.lengths, self.options)
            if one:
                _decode.launch(q, *known, out, tiling, Newest(layer.rotation, self.slots))
            else:
                to = layer.cache, self.slots, kv_heads, self.dim
                rotary.rotate_append(qkv, layer.rotation, *to)
                _decode.launch(q, *known, out, tiling)
            return out

        return run


def microseconds(case: Case, attend: Callable[[torch.Tensor, Layer], torch.Tensor]) -> Any:
    """Of a layer, and what the layers gave."""
    case.run(attend)  # compiles, and makes what a graph may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = case.run(attend)
    times = []
    for _ in range(6):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(8):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 8 / len(case.layers))
    return statistics.median(times[1:]), y.clone()


def cut(text: str) -> tuple[Tiling, bool]:
    """A tiling, and whether it is one kernel's."""
    *numbers, last = text.split(",")
    if last.isdigit():
        return Tiling(*map(int, (*numbers, last))), False
    return Tiling(*map(int, numbers), early=last), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=shapes.SHAPES, default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--context", type=int, default=545)
    parser.add_argument("--cuts", type=cut, nargs="+")
    parser.add_argument("--top", type=int, default=12, help="cuts that are printed")
    options = parser.parse_args()
    gpu.needed()
    torch.set_default_device("cuda")
    print(f"{torch.cuda.get_device_name()}, {options.shape}, {options.context} tokens")
    for batch in options.batch:
        torch.manual_seed(0)
        case = Case(options.shape, batch, options.context)
        base = paged_attention.decode_tiling(batch, case.dim, BF16)
        two, wanted = microseconds(case, case.attend(base, one=False))
        print(f"batch {batch}: two kernels {two:.2f} us a layer, {base}")
        lines = []
        for tiling, one in options.cuts or [
            (paged_attention.append_tiling(batch, case.dim, BF16), True)
        ]:
            spent, found = microseconds(case, case.attend(tiling, one=one))
            off = (found.float() - wanted.float()).norm() / wanted.float().norm()
            ratio, name = spent / two, "one" if one else "two"
            lines.append((spent, f"{name} {spent:.2f} ({ratio:.3f}), off {off:.1e}: {tiling}"))
        for _, line in sorted(lines)[: options.top]:
            print(" ", line, flush=True)


if __name__ == "__main__":
    main()
