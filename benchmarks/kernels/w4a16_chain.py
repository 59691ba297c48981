"""One row times codes in a chain of layers: which form of each product makes the chain fastest.

    python benchmarks/kernels/w4a16_chain.py --methods int4 int8 fp8

As `skinny_chain.py`, of the 8B shape and one row, whose gates are made in the product behind which
they stand. First the chain by the forms in use, with gates in all three ways, and of 4 bits by the
forms of cards before Hopper. The rules of `_turning` and `_streamed` come from such figures.
"""

import argparse
import itertools
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import gpu  # beside this file
import torch
from skinny_chain import BF16, EPS, Sizes, improved, microseconds  # beside this file

from kvrun.runtime.kernels import w4a16 as twin
from kvrun.runtime.kernels.triton import gated, w4a16
from kvrun.runtime.kernels.triton._device import sm_count
from kvrun.runtime.kernels.triton.w4a16 import Form

SHAPE = "llama-3-8b"
INSIDE, BETWEEN, BEHIND = "gates in the product", "by themselves", "in each program of the next"
Forms = tuple[Form, ...]


def matrix(method: str, n: int, k: int) -> twin.Coded:
    """4 bits with zeros for 128 columns, else a scale for each row; a product keeps x's size."""
    groups = k // 128 if method == "int4" else 1
    scale = ((torch.rand(n, groups) + 0.5) * k**-0.5).to(BF16)
    if method == "fp8":
        return twin.Coded(torch.randn(n, k).to(torch.float8_e4m3fn), scale, k, k, bits=8)
    bits = int(method[3:])
    words = -(-k // twin.block(bits)) * twin.WORDS
    codes = torch.randint(-(2**31), 2**31 - 1, (n, words), dtype=torch.int32)
    if method == "int8":
        return twin.Coded(codes, scale / 64, k, k, bits=8)
    zero = torch.randint(-3, 4, scale.shape).to(torch.int8)
    return twin.beside(twin.Coded(codes, scale / 5, k, 128, zero))


def own(method: str, n: int, k: int, hopper: bool = True) -> Form:
    sms, words = sm_count(torch.device("cuda", 0)), -(-k // 256) * twin.WORDS
    if method == "int4" and words <= (2048 if hopper else 512):
        return w4a16._turning(n, words, sms, hopper)
    return w4a16.config(1, n, k, method, sms)


def candidates(method: str, n: int, k: int) -> list[Form]:
    found, sms = [own(method, n, k)], sm_count(torch.device("cuda", 0))
    if method != "int4":
        words = k // 4
        for block_n, warps, wide in itertools.product((2, 4, 8), (2, 4, 8, 16), (128, 256)):
            if wide * warps <= words:
                found.append(Form(False, block_n, warps, wide * warps))
        return list(dict.fromkeys(found))
    block_w = max(64, 1 << (-(-k // 8) - 1).bit_length())
    for sets, each, stages in itertools.product((1, 2), (1, 2, 3, 4, 6, 8), (1, 2, 3)):
        warps = block_w // 64 // sets
        if 1 <= warps <= 16:
            found.append(Form(True, 8, warps, block_w, stages=stages, turning=each * sms))
    return list(dict.fromkeys(found))


def layer(
    forms: Forms, x: torch.Tensor, weights: Iterable[twin.Coded], gain: torch.Tensor, gates: str
) -> torch.Tensor:
    qkv, o, gate_up, down = weights
    inside: dict[str, Any] = {"norm": gain, "eps": EPS}
    run = w4a16.run
    y = run(forms[0], x, qkv, **inside)
    x = run(forms[1], y[:, : o.columns], o, add=x, out=x)
    y = run(forms[2], x, gate_up, **inside, gated="silu" if gates == INSIDE else None)
    if gates == BEHIND:
        return run(forms[3], y, down, act="silu", add=x, out=x)
    return run(forms[3], gated.gated(y, "silu") if gates == BETWEEN else y, down, add=x, out=x)


def compiled(method: str, products: tuple[tuple[int, int], ...], forms: Forms) -> None:
    """In a process of its own: the cache on disk then has the kernels of one form each."""
    torch.set_default_device("cuda")
    x, gain = torch.randn(1, products[0][1]).to(BF16), torch.ones(products[0][1])
    layer(forms, x, [matrix(method, n, k) for n, k in products], gain, INSIDE)
    torch.cuda.synchronize()


def search(method: str, sizes: Sizes, pool: ProcessPoolExecutor) -> None:
    products = sizes.products
    wanted = [candidates(method, n, k) for n, k in products]
    kernels = itertools.zip_longest(*wanted)
    whole = [tuple(f or forms[0] for f, forms in zip(row, wanted, strict=True)) for row in kernels]
    list(pool.map(partial(compiled, method, products), whole))
    weights = [[matrix(method, n, k) for n, k in products] for _ in range(sizes.layers)]
    x, gain = torch.randn(1, products[0][1]).to(BF16), torch.ones(products[0][1])

    def chain(forms: Forms, gates: str = INSIDE) -> None:
        y = x.clone()
        for of_layer in weights:
            y = layer(forms, y, of_layer, gain, gates)

    def spent(forms: Forms, gates: str = INSIDE) -> float:
        return microseconds(partial(chain, forms, gates)) / sizes.layers

    usual: Forms = tuple(forms[0] for forms in wanted)
    ways = [INSIDE, BETWEEN] if method == "int4" else [INSIDE, BETWEEN, BEHIND]
    print(f"{method}, us a layer:", "; ".join(f"{way} {spent(usual, way):.2f}" for way in ways))
    if method == "int4":
        before = tuple(own(method, n, k, hopper=False) for n, k in products)
        print(f"  without tensor cores, gates {BETWEEN}: {spent(before, BETWEEN):.2f}")
    _, least, fastest = improved(wanted, spent)
    size = sum(one.nbytes for one in weights[0])
    print(f"  at best {least:.2f}, {size / least / 1e6:.2f} TB/s:")
    for (n, k), form in zip(products, fastest, strict=True):
        print(f"  {n:6} x {k:5}: {form}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--methods", nargs="+", choices=("int4", "int8", "fp8"),
                        default=["int4", "int8", "fp8"])  # fmt: skip
    args = parser.parse_args()
    gpu.needed()
    torch.set_default_device("cuda")
    sizes = Sizes.of(SHAPE)
    print(f"{torch.cuda.get_device_name()}, {SHAPE}, {sizes.layers} layers")
    with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
        for method in args.methods:
            search(method, sizes, pool)


if __name__ == "__main__":
    main()
