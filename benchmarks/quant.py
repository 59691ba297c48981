"""Quantized weights: kernels against their twins, products, and decode steps of a whole model.

`python benchmarks/quant.py` on a GPU: checks, products, then the 8B shape at batch 1 and 256 with
weights as they are, int8, int4, fp8 and nf4. Weights are random, nothing is downloaded; prompts are
token ids, decoding is greedy, the prefix cache is off. A step is (time of 168 new tokens - time of
40) / 128, the median of `--repeats`: with fewer than 40 the first answers of 256 would end while
the last prompts are read, and both times would not read them alike.

`--cpu`: the 135M shape at batch 1 on the threads that torch has (OMP_NUM_THREADS). The models take
turns, and are compared turn by turn. Beside other programs `--clock cpu` counts the time that this
one has run, with one thread the time it would have taken alone.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import needs  # beside this file
import torch

from kvrun import LLM, SamplingParams
from kvrun.bench import cuda_rates, shapes, workloads
from kvrun.runtime.kernels import fp8 as fp8_twin
from kvrun.runtime.kernels import w4a16 as twin
from kvrun.runtime.kernels.w4a16 import Coded
from kvrun.runtime.quant import _round

METHODS = (None, "int8", "int4", "fp8", "nf4")
ROWS = (1, 2, 4, 5, 8, 16, 33, 64, 128, 256, 300)
SIZES = ((1000, 1536), (576, 576), (512, 14336))  # of the check: N, K
PRODUCTS = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096),
            "down": (4096, 14336)}  # fmt: skip


def check(device: torch.device) -> None:
    """Every kind and number of rows against the twin; raises AssertionError."""
    from kvrun.runtime.kernels.triton import fp8, w4a16

    for dtype in (torch.bfloat16, torch.float16):
        for n, k in SIZES:
            weight = torch.randn(n, k, device=device, dtype=dtype) * k**-0.5
            for method in METHODS[1:]:
                made = _round.coded(weight, str(method))._replace(order=None)
                values = w4a16.dequantise(made, dtype)
                _near(values, twin.dequantise(made, dtype), 1e-3, method, "values", n, k)
                for m in ROWS:
                    _product(w4a16, made, m, dtype)
    x = torch.randn(33, 4096, device=device, dtype=torch.bfloat16)
    codes, scale = fp8.quantise_rows(x)
    ref, ref_scale = fp8_twin.quantise_rows(x)
    assert torch.allclose(scale, ref_scale)
    assert float((codes.float() != ref.float()).float().mean()) < 1e-3
    print("kernels equal their twins", flush=True)


def _product(kernel: Any, made: Coded, m: int, dtype: torch.dtype) -> None:
    n, k, device = len(made.codes), made.columns, made.codes.device
    x, add = (torch.randn(m, size, device=device, dtype=dtype) for size in (k, n))
    if kernel.serves(m, made):
        got, ref = kernel.linear(x, made, add=add), twin.linear(x, made, add=add)
        _near(got, ref, 1e-2, made.bits, m, n, k)
        again = kernel.linear(x, made, add=add)
        assert torch.equal(got, again), "equal inputs, other bits"
    if kernel.takes_in(m, made):
        norm = torch.rand(k, device=device) + 0.5
        options: dict[str, Any] = {"norm": norm, "eps": 1e-5}
        _near(kernel.linear(x, made, **options), twin.linear(x, made, **options), 1e-2, "norm", m)
        both = torch.randn(m, 2 * k, device=device, dtype=dtype)
        _near(kernel.linear(both, made, act="silu"), twin.linear(both, made, act="silu"), 1e-2, m)


def _near(got: torch.Tensor, ref: torch.Tensor, most: float, *what: object) -> None:
    off = float((got.float() - ref.float()).norm() / ref.float().norm())
    assert off < most, f"{what}: relative error {off:.2e}"


def products(device: torch.device) -> dict[str, float]:
    """µs of an 8B layer's four products, one after the other, by method and rows."""
    found = {}
    for method in METHODS:
        weights = []
        for n, k in PRODUCTS.values():
            for _ in range(2):  # more than a cache holds
                plain = torch.randn(n, k, device=device, dtype=torch.bfloat16) * k**-0.5
                weights.append((_lay_out(plain, method), k))
        for m in (1, 4, 8, 16, 32, 64, 128, 256, 512):
            inputs = {k: torch.randn(m, k, device=device, dtype=torch.bfloat16) for _, k in weights}

            def work(inputs: dict[int, torch.Tensor] = inputs, weights: Any = weights) -> None:
                for weight, k in weights:
                    weight.matmul(inputs[k])

            found[f"{method or 'bf16'} {m}"] = _graphed(work) / 2
        line = ", ".join(f"{name.split()[1]}: {us:.0f}" for name, us in found.items()
                         if name.split()[0] == (method or "bf16"))  # fmt: skip
        print(f"products of a layer, µs by rows, {method or 'bf16'}: {line}", flush=True)
    return found


def _lay_out(plain: torch.Tensor, method: str | None) -> Any:
    from kvrun.runtime.quant import _coded, dense

    if method is None:
        return dense.lay_out(plain)
    return _coded.lay_out(_round.coded(plain, method), plain.dtype)[0]


def _graphed(work: Callable[[], None]) -> float:
    """µs of one run in a CUDA graph, the least of 20."""
    return 1e6 * cuda_rates.best(cuda_rates.captured(work).replay, 20)


def steps(
    shape: str, methods: Sequence[str | None], batches: Sequence[int], repeats: int,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """ms of a decode step by method and batch, and seconds until the model was ready."""
    found: dict[str, Any] = {}
    with shapes.folder(shape) as folder:
        for method in methods:
            begun = time.perf_counter()
            llm = LLM(str(folder), load_format="dummy", quantize=method, prefix_caching=False,
                      max_model_len=1024, max_num_seqs=max(batches), **options)  # fmt: skip
            ready = time.perf_counter() - begun
            mine: dict[str, Any] = {"ready_s": ready, "plan": llm.plan}
            for batch in batches:
                prompts = workloads.fixed(batch, 512)
                _seconds(llm, prompts, 4)
                times = [
                    (_seconds(llm, prompts, 168) - _seconds(llm, prompts, 40)) / 128
                    for _ in range(repeats)
                ]
                mine[f"batch {batch}"] = ms = 1e3 * statistics.median(times)
                print(f"{shape} {method or 'bf16'}, batch {batch}: {ms:.3f} "
                      f"ms, {1e3 * batch / ms:,.1f} tok/s (ready after {ready:.0f} s)",
                      flush=True)  # fmt: skip
            found[method or "plain"] = mine
            llm.close()
            del llm
            gc.collect()
            torch.cuda.empty_cache()
    return found


def in_turns(shape: str, turns: int, clock: Callable[[], float], **options: Any) -> dict[str, Any]:
    """ms of a decode step at batch 1 by method, and how many times as fast as plain weights."""
    found: dict[str, list[float]] = {}
    with shapes.folder(shape) as folder:
        models = {
            method: LLM(str(folder), load_format="dummy", quantize=method, prefix_caching=False,
                        max_model_len=1024, max_num_seqs=1, **options)
            for method in METHODS[:3]
        }  # fmt: skip
    prompt = workloads.fixed(1, 32)
    for llm in models.values():
        _seconds(llm, prompt, 8)
    for _ in range(turns):
        for method, llm in models.items():
            spent = _seconds(llm, prompt, 72, clock) - _seconds(llm, prompt, 8, clock)
            found.setdefault(method or "plain", []).append(1e3 * spent / 64)
    for name, times in found.items():
        ratios = [plain / own for plain, own in zip(found["plain"], times, strict=True)]
        print(
            f"{shape} {name}, batch 1: {statistics.median(times):.2f} ms ({min(times):.2f} to "
            f"{max(times):.2f}), {statistics.median(ratios):.2f} times as fast as plain "
            f"({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    return dict(found)


def _seconds(
    llm: LLM, prompts: Any, new: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    begun = clock()
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    outputs = llm.generate(list(prompts), params)
    assert all(output.finish_reason == "length" for output in outputs)
    return clock() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cpu", action="store_true", help="the 135M shape on CPU")
    parser.add_argument("--dtype", default="bfloat16", help="of the plain weights, with --cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="with --cpu")
    parser.add_argument("--only", choices=("check", "products", "steps"))
    names = [method or "bf16" for method in METHODS]
    parser.add_argument("--methods", nargs="+", choices=names, default=names, help="of the steps")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 256], help="of the steps")
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    if not args.cpu:
        needs.gpu("use --cpu", triton=True)
    methods = [None if name == "bf16" else name for name in args.methods]
    found: dict[str, Any] = {}
    if args.cpu:
        options = {"device": "cpu", "dtype": args.dtype, "threads": torch.get_num_threads()}
        clock = time.process_time if args.clock == "cpu" else time.perf_counter
        found["steps_ms"] = in_turns("smollm2-135m", 3 * args.repeats, clock, **options)
    else:
        device = torch.device("cuda")
        found["device"] = torch.cuda.get_device_name()
        print(found["device"], flush=True)
        if args.only in (None, "check"):
            check(device)
        if args.only in (None, "products"):
            found["products_us"] = products(device)
        if args.only in (None, "steps"):
            found["steps"] = steps("llama-3-8b", methods, args.batch, args.repeats)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
