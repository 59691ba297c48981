"""Several rows times codes in a chain of layers: which form of each product makes it fastest.

    python benchmarks/kernels/w4a16_many.py --method int4 --rows 16 64 256

As `w4a16_chain.py`, of the 8B shape, with norms and gates as kernels of their own. Before each
measurement the card has computed for a while, because its clock falls then. First the same chain in
bf16 by cuBLAS. The rules of `w4a16.config` for tensor cores come from such figures.
"""

import argparse
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import gpu  # beside this file
import torch
import torch.nn.functional as F
from skinny import seconds  # beside this file
from skinny_chain import BF16, EPS, Sizes, improved
from w4a16_chain import SHAPE, Forms, matrix

from kvrun.runtime.kernels import w4a16 as twin
from kvrun.runtime.kernels.triton import gated, norm, w4a16
from kvrun.runtime.kernels.triton._device import shared_memory, sm_count
from kvrun.runtime.kernels.triton.w4a16 import Form

WARM = 0.15  # seconds
# Outputs, warps and rows of a tile, for more than 64 rows and for fewer, whose tiles hold all.
TILES = ((128, 8, 128), (64, 4, 128), (64, 4, 64), (128, 8, 64))
FEWER = ((64, 4), (128, 8))
Job = tuple[Form, int, int]  # and the size of its matrix


def own(method: str, rows: int, n: int, k: int) -> Form:
    device = torch.device("cuda", 0)
    form = w4a16.config(rows, n, k, method, sm_count(device))
    return w4a16.fitting(form, int(method[3:]), 0, shared_memory(device))


def candidates(method: str, rows: int, n: int, k: int) -> list[Form]:
    device = torch.device("cuda", 0)
    sms, found = sm_count(device), [own(method, rows, n, k)]
    whole = max(16, 1 << (rows - 1).bit_length())
    cuts = TILES if rows > 64 else tuple((*cut, whole) for cut in FEWER)
    for cut, splits, stages in itertools.product(cuts, (1, 2, 3, 4, 6, 8), (3, 2)):
        block_n, warps, tile = cut
        form = Form(True, block_n, warps, rows=tile, stages=stages, splits=splits)
        tiles = -(-n // block_n) * -(-rows // tile)
        if splits > 1 and tiles * splits > (2.2 if rows > 64 else 4.4) * sms:
            continue
        if stages < 3 and rows <= 64:
            continue
        if w4a16.fitting(form, int(method[3:]), 0, shared_memory(device)) == form:
            found += [form, form._replace(joined=True)]
    return list(dict.fromkeys(found))


def kernel(form: Form, n: int, k: int) -> Job:
    """What stands for all products that the same kernel computes."""
    return form._replace(splits=min(2, form.splits)), n, k


def compiled(method: str, rows: int, job: Job) -> str:
    """In a process of its own: the cache on disk then has the kernel. Says what failed."""
    form, n, k = job
    torch.set_default_device("cuda")
    try:
        x, made = torch.randn(rows, k).to(BF16), matrix(method, n, k)
        add = torch.randn(rows, n).to(BF16)
        wanted = add.double() + x.double() @ twin.dequantise(made, torch.float32).double().t()
        got = w4a16.run(form, x, made, add=add).double()
        w4a16.run(form, x, made)
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{job}: {str(failure)[:200]}"
    error = float((got - wanted).norm() / wanted.norm())
    return "" if error < 1e-2 else f"{job}: wrong, {error:.1e}"


def layer(
    forms: Forms, x: torch.Tensor, weights: Iterable[twin.Coded], gain: torch.Tensor
) -> torch.Tensor:
    qkv, o, gate_up, down = weights
    y = w4a16.run(forms[0], norm.rms_norm(x, gain, EPS), qkv)
    x = w4a16.run(forms[1], y[:, : o.columns], o, add=x, out=x)
    y = w4a16.run(forms[2], norm.rms_norm(x, gain, EPS), gate_up)
    return w4a16.run(forms[3], gated.gated(y, "silu"), down, add=x, out=x)


def dense_layer(x: torch.Tensor, weights: Iterable[torch.Tensor], gain: torch.Tensor) -> None:
    qkv, o, gate_up, down = weights
    y = F.linear(norm.rms_norm(x, gain, EPS), qkv)
    x.addmm_(y[:, : o.shape[1]], o.t())
    y = F.linear(norm.rms_norm(x, gain, EPS), gate_up)
    x.addmm_(gated.gated(y, "silu"), down.t())


def microseconds(run: Callable[[], Any]) -> float:
    return 1e6 * seconds([run], warm=WARM)


def cublas(sizes: Sizes, x: torch.Tensor, gain: torch.Tensor) -> float:
    """Microseconds of a layer."""
    dense = [[torch.randn(n, k).mul_(k**-0.5).to(BF16) for n, k in sizes.products]
             for _ in range(sizes.layers)]  # fmt: skip

    def chain() -> None:
        y = x.clone()
        for weights in dense:
            dense_layer(y, weights, gain)

    return microseconds(chain) / sizes.layers


def search(method: str, rows: int, sizes: Sizes, pool: ProcessPoolExecutor, in_use: bool) -> None:
    products = sizes.products
    x, gain = torch.randn(rows, products[0][1]).to(BF16), torch.ones(products[0][1])
    print(f"{rows} rows, bf16 by cuBLAS: {cublas(sizes, x, gain):.1f} us a layer", flush=True)
    torch.cuda.empty_cache()
    wanted = {(n, k): candidates(method, rows, n, k)[: 1 if in_use else None] for n, k in products}
    jobs = list(
        dict.fromkeys(kernel(form, n, k) for (n, k), forms in wanted.items() for form in forms)
    )
    failures = list(pool.map(partial(compiled, method, rows), jobs))
    for failure in filter(None, failures):
        print(failure)
    bad = {job for job, failure in zip(jobs, failures, strict=True) if failure}
    right = [[form for form in forms if kernel(form, n, k) not in bad]
             for (n, k), forms in wanted.items()]  # fmt: skip
    coded = [[matrix(method, n, k) for n, k in products] for _ in range(sizes.layers)]

    def chain(forms: Forms) -> None:
        y = x.clone()
        for weights in coded:
            y = layer(forms, y, weights, gain)

    def spent(forms: Forms) -> float:
        return microseconds(partial(chain, forms)) / sizes.layers

    if in_use:
        print(f"{method}: {spent(tuple(forms[0] for forms in right)):.1f} us a layer")
        return
    first, least, fastest = improved(right, spent)
    print(f"{method}: {first:.1f} us a layer by config, at best {least:.1f}")
    for (n, k), form in zip(products, fastest, strict=True):
        print(f"  {n:6} x {k:5}: {form}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--method", choices=("int4", "int8"), default="int4")
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256], help="more than 1")
    parser.add_argument("--in-use", action="store_true", help="time only the forms in use")
    args = parser.parse_args()
    gpu.needed()
    torch.set_default_device("cuda")
    sizes = Sizes.of(SHAPE)
    print(f"{torch.cuda.get_device_name()}, {SHAPE}, {sizes.layers} layers")
    with ProcessPoolExecutor(14, mp_context=get_context("spawn")) as pool:
        for rows in args.rows:
            search(args.method, rows, sizes, pool, args.in_use)


if __name__ == "__main__":
    main()
