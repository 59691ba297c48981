"""Products of few rows in a chain of layers: which form of each makes the whole chain fastest.

    python benchmarks/kernels/skinny_chain.py --shape qwen3-0.6b --rows 1 8 32

qkv, o, gate_up and down of every layer with their norms, gates and residuals, without attention, in
one CUDA graph. In turns each product is cut in all forms while the others keep their best; what a
chain takes is the least of 8 runs. The rules of `_skinny_forms.py` come from such figures.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import gpu  # beside this file
import torch

from kvrun.bench import shapes
from kvrun.bench.cuda_rates import best, captured
from kvrun.runtime.kernels.triton import norm, skinny
from kvrun.runtime.kernels.triton._device import shared_memory, sm_count
from kvrun.runtime.kernels.triton._skinny_forms import Form, config

BF16 = torch.bfloat16
LARGEST = 6 << 30  # bytes of all layers, at most
EPS = 1e-6
ORDER = (2, 3, 0, 1)  # the largest product first
Forms = tuple[Form, ...]


class Sizes(NamedTuple):
    """Of a layer: [out, in] of its four products, in the order in which they are run."""

    layers: int
    products: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, shape: str) -> "Sizes":
        c = shapes.SHAPES[shape]
        hidden, heads, inner = c["hidden_size"], c["num_attention_heads"], c["intermediate_size"]
        dim = c.get("head_dim", hidden // heads)
        rows = (heads + 2 * c["num_key_value_heads"]) * dim
        products = (rows, hidden), (hidden, heads * dim), (2 * inner, hidden), (hidden, inner)
        each = sum(2 * n * k for n, k in products)
        return cls(min(c["num_hidden_layers"], LARGEST // each), products)


def candidates(rows: int, n: int, k: int) -> list[Form]:
    found = [own(rows, n, k)]
    if rows <= 4:
        cuts = ((512, 1), (1024, 2), (1024, 4), (2048, 8))
        found += [Form(False, out, *cut, s) for out in (2, 4, 8) for cut in cuts for s in (0, 1)]
        return list(dict.fromkeys(found))
    few = ((128, 4), (128, 6), (256, 3))
    for (block, stages), splits in itertools.product(
        few if rows <= 16 else ((128, 4), (128, 3), (64, 4), (64, 6)), (1, 2, 3, 4, 6, 8)
    ):
        if splits == 1 or (k >= splits * block and n // 64 * splits <= 600):
            found.append(Form(True, 64, block, 4, stages, splits, ahead=2 * block))
    return list(dict.fromkeys(found))


def own(rows: int, n: int, k: int) -> Form:
    device = torch.device("cuda", 0)
    return config(rows, n, k, BF16, sm_count(device), shared_memory(device), overlap=True)


def layer(
    forms: Forms, x: torch.Tensor, weights: list[torch.Tensor], gain: torch.Tensor
) -> torch.Tensor:
    """As an engine runs it: up to 16 rows, products take in norms."""
    qkv, o, gate_up, down = weights
    inside: dict[str, Any] = {"norm": gain, "eps": EPS}
    few = skinny.takes_in(len(x), BF16)
    y = x if few else norm.rms_norm(x, gain, EPS)
    y = skinny.run(forms[0], y, qkv, **inside if few else {})
    x = skinny.run(forms[1], y[:, : o.shape[1]], o, add=x, out=x)
    y = x if few else norm.rms_norm(x, gain, EPS)
    y = skinny.run(forms[2], y, gate_up, gated="silu", **inside if few else {})
    return skinny.run(forms[3], y, down, add=x, out=x)


def microseconds(run: Callable[[], Any]) -> float:
    return 1e6 * best(captured(run).replay, 8)


def improved(
    wanted: Sequence[Sequence[Any]], spent: Callable[[tuple[Any, ...]], float]
) -> tuple[float, float, tuple[Any, ...]]:
    """What a chain takes by the first form of each product and at best, and the forms of that."""
    fastest = tuple(forms[0] for forms in wanted)
    least = first = spent(fastest)
    for _ in range(2):
        for turn in ORDER:
            for form in wanted[turn]:
                now = (*fastest[:turn], form, *fastest[turn + 1 :])
                if (taken := spent(now)) < least:
                    least, fastest = taken, now
    return first, least, fastest


def compiled(rows: int, products: tuple[tuple[int, int], ...], forms: Forms) -> None:
    """In a process of its own: the cache on disk then has the kernels of one form each."""
    torch.set_default_device("cuda")
    weights = [torch.randn(n, k).to(BF16) for n, k in products]
    x, gain = torch.randn(rows, products[0][1]).to(BF16), torch.ones(products[0][1])
    layer(forms, x, weights, gain)
    torch.cuda.synchronize()


def search(sizes: Sizes, rows: int, pool: ProcessPoolExecutor) -> None:
    products = sizes.products
    wanted = [candidates(rows, n, k) for n, k in products]
    kernels = itertools.zip_longest(*wanted)
    whole = [tuple(f or forms[0] for f, forms in zip(row, wanted, strict=True)) for row in kernels]
    list(pool.map(partial(compiled, rows, products), whole))
    weights = [[torch.randn(n, k).mul_(k**-0.5).to(BF16) for n, k in products]
               for _ in range(sizes.layers)]  # fmt: skip
    x, gain = torch.randn(rows, products[0][1]).to(BF16), torch.ones(products[0][1])

    def chain(forms: Forms) -> None:
        y = x.clone()
        for of_layer in weights:
            y = layer(forms, y, of_layer, gain)

    first, least, fastest = improved(wanted, lambda forms: microseconds(partial(chain, forms)))
    bytes_read = sizes.layers * sum(2 * n * k for n, k in products)
    print(f"{rows} rows: {first:.0f} us by config, {least:.0f} at best: "
          f"{bytes_read / least / 1e6:.2f} TB/s")  # fmt: skip
    for (n, k), form in zip(products, fastest, strict=True):
        print(f"  {n:6} x {k:5}: {form}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="qwen3-0.6b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32], help="up to 64")
    args = parser.parse_args()
    gpu.needed()
    torch.set_default_device("cuda")
    sizes = Sizes.of(args.shape)
    print(f"{torch.cuda.get_device_name()}, {args.shape}, {sizes.layers} layers")
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        for rows in args.rows:
            search(sizes, rows, pool)


if __name__ == "__main__":
    main()
