"""Products with codes of 4 and 8 bits on a GPU: which form is the fastest for how many rows.

`python benchmarks/kernels/w4a16.py [--bits 4 8] [--rows 1 16 256] [--warm 0.5]`. The four products
of a layer of Llama 3 8B, codes in groups of 128 with zeros (4 bits) or with a scale for each row (8
bits), from rotating copies larger than the L2 cache, inside one CUDA graph; every form is right
within 1e-2 or is not timed. Beside the forms: `values`, which makes all values and multiplies them
by cuBLAS, and `now`, the form in use. Microseconds. `--warm` seconds of the same go before each
measurement, for cards that slow down under load.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable
from functools import partial

import gpu  # beside this file
import torch
from skinny import seconds, turns  # beside this file

from kvrun.runtime.kernels import w4a16 as twin
from kvrun.runtime.kernels.triton import w4a16
from kvrun.runtime.kernels.triton.w4a16 import Form
from kvrun.runtime.quant._cuda import Fused

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
ROWS = (1, 2, 16, 32, 64, 128, 256, 512)
CUTS = {
    16: [(64, 4, 3), (64, 4, 4), (128, 8, 3)],
    32: [(64, 4, 3), (128, 8, 3)],
    64: [(64, 4, 3), (128, 8, 3)],
    128: [(64, 4, 3), (128, 8, 3), (128, 8, 2)],
}  # rows of a tile: outputs, warps, stages
ONE_ROW = [(4, 4, 512), (8, 4, 512), (4, 2, 256), (4, 8, 1024)]  # outputs, warps, words a turn
Job = tuple[Form, int, int, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--warm", type=float, default=0.0)
    args = parser.parse_args()
    gpu.needed()
    begun = time.monotonic()
    jobs = {
        (form._replace(splits=min(2, form.splits)), form.rows, k, bits)
        for bits in args.bits
        for m in args.rows
        for n, k in SHAPES.values()
        for form in forms(m, n, k, bits)
    }
    with multiprocessing.get_context("spawn").Pool() as pool:
        for failure in set(pool.map(compiled, sorted(jobs), chunksize=1)) - {""}:
            print("does not compile:", failure)
    print(f"{len(jobs)} kernels compiled after {time.monotonic() - begun:.0f} s", flush=True)
    for bits in args.bits:
        totals = dict.fromkeys(args.rows, 0.0)
        for name, (n, k) in SHAPES.items():
            size = n * k * bits // 8
            copies = [matrix(bits, n, k) for _ in range(max(2, -(-(120 << 20) // size)))]
            for m in args.rows:
                totals[m] += product(name, m, copies, args.warm)
        print(f"int{bits}, all four:", ", ".join(f"{m} rows {t:.0f}" for m, t in totals.items()))


def matrix(bits: int, n: int, k: int) -> twin.Coded:
    words = -(-k // twin.block(bits)) * twin.WORDS
    codes = torch.randint(-(2**31), 2**31 - 1, (n, words), dtype=torch.int32, device="cuda")
    group = 128 if bits == 4 else k
    scale = (torch.rand(n, k // group, device="cuda") * 0.01 + 0.01).bfloat16()
    zero = None
    if bits == 4:
        zero = torch.randint(-8, 8, scale.shape, device="cuda").to(torch.int8)
    return twin.beside(twin.Coded(codes, scale, k, group, zero, bits=bits))


def forms(m: int, n: int, k: int, bits: int) -> list[Form]:
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    rows = min(128, max(16, 1 << (m - 1).bit_length()))
    found = [Form(False, *cut) for cut in ONE_ROW] if m == 1 else []
    for block_n, warps, stages in CUTS[rows]:
        tiles = -(-n // block_n) * -(-m // rows)
        for per_sm in (1, 2, 4):
            most = k // twin.block(bits) // 2
            splits = max(1, min(round(per_sm * sm_count / tiles), most, 8))
            form = Form(True, block_n, warps, rows=rows, stages=stages, splits=splits)
            found += [form, form._replace(joined=True)]
    return list(dict.fromkeys(found))


def compiled(job: Job) -> str:
    """In a process of its own: the cache on disk then has the kernel. Says what failed."""
    form, m, k, bits = job
    try:
        x = torch.randn(m, k, device="cuda").bfloat16()
        w4a16.run(form, x, matrix(bits, 2 * form.block_n, k))
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{job}: {str(failure)[:200]}"
    return ""


def product(name: str, m: int, copies: list[twin.Coded], warm: float) -> float:
    """Prints the fastest forms of one product; microseconds of the one in use."""
    n, k, bits = len(copies[0].codes), copies[0].columns, copies[0].bits
    x = torch.randn(m, k, device="cuda").bfloat16()
    wanted = x.double() @ twin.dequantise(copies[0], torch.float32).double().t()
    out = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")
    times = {}
    for form in forms(m, n, k, bits):
        got = w4a16.run(form, x, copies[0], out=out).double()
        if float((got - wanted).norm() / wanted.norm()) < 1e-2:
            times[said(form)] = timed(partial(w4a16.run, form, x, out=out), copies, warm)
        else:
            print(f"{name}, {m} rows: {form} is wrong")
    if m >= 128:
        weights = {id(c.codes): Fused(c, None) for c in copies}
        times["values"] = timed(lambda matrix: weights[id(matrix.codes)]._many(x), copies, warm)
    now = timed(lambda matrix: Fused(matrix, None).matmul(x), copies, warm)
    best = sorted(times, key=times.__getitem__)[:4]
    print(
        f"int{bits} {m:3} {name:8} now {now:6.1f} | "
        + "; ".join(f"{times[key]:.1f} {key}" for key in best),
        flush=True,
    )
    return now


def timed(call: Callable[..., torch.Tensor], copies: list[twin.Coded], warm: float) -> float:
    return 1e6 * seconds([partial(call, matrix=matrix) for matrix in turns(copies)], warm=warm)


def said(form: Form) -> str:
    cut = f"{form.block_n} x {form.rows}, {form.warps} warps, {form.stages} stages"
    kind, more = ("dot", f", K in {form.splits}") if form.dot else ("fma", "")
    more += ", fields joined" if form.joined else ""
    return f"{kind} {cut}{more}"


if __name__ == "__main__":
    main()
