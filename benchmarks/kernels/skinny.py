"""Products of few rows: right at every size, how fast in which form, and a whole layer's chain.

    python benchmarks/kernels/skinny.py [--seconds 75] [--json OUT.json] [--smoke]

Weights are read from rotating copies larger than the L2 cache, inside one CUDA graph. The chain is
qkv, o, gate_up, down of every layer with their norms, activation and residuals, without attention.
`--smoke` checks tiny shapes only, on CPU with TRITON_INTERPRET=1.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import skinny as twin
from kvrun.runtime.kernels.triton import skinny
from kvrun.runtime.kernels.triton.skinny import Form

SHAPES = {
    "8B": {
        "qkv": (6144, 4096),
        "o": (4096, 4096),
        "gate_up": (28672, 4096),
        "down": (4096, 14336),
        "head": (128256, 4096),
    },
    "0.6B": {
        "qkv": (4096, 1024),
        "o": (1024, 2048),
        "gate_up": (6144, 1024),
        "down": (1024, 3072),
        "head": (151936, 1024),
    },
}
LAYERS = {"8B": 32, "0.6B": 28}
ROWS = (1, 8, 2, 4, 16, 32)
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 1e-5}
PROCESSES = 14
EPS = 1e-5

Job = tuple[Form, int, int, torch.dtype, tuple[tuple[str, Any], ...], bool]
record: dict[str, Any] = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=75)
    parser.add_argument("--json")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if options.smoke or not torch.cuda.is_available():
        check(cases(small=True), torch.device("cpu"))
        return
    with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
        measure(pool, deadline)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)


def measure(pool: Any, deadline: float) -> None:
    begun = time.monotonic()
    sm_count = torch.cuda.get_device_properties(0).multi_processor_count
    work = [
        (name, m, n, k, candidates(m, n, k, sm_count))
        for m in ROWS
        for model in SHAPES
        for name, (n, k) in SHAPES[model].items()
    ]
    to_check = cases(small=False)
    jobs = jobs_of((form, m, k, torch.bfloat16, {}, True) for _, m, _, k, fs in work for form in fs)
    jobs |= jobs_of((*case[:2], *case[3:], True) for case in to_check)
    compiling = pool.map_async(compile_one, jobs, chunksize=1)
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, {sm_count} SMs, torch {torch.__version__}")
    print(f"copy, read and write counted: {rate / 1e12:.2f} TB/s")
    record.update(device=torch.cuda.get_device_name(), copy=rate, sweep=[], chain=[])
    for failure in set(compiling.get()) - {""}:
        print("does not compile:", failure)
    print(f"{len(jobs)} kernels compiled after {time.monotonic() - begun:.0f} s")
    check(to_check, torch.device("cuda"))
    best = sweep(work, deadline - 30)
    print(f"sweep ends after {time.monotonic() - begun:.0f} s")
    for m in (1, 8, 4, 16):
        for model in SHAPES:
            if time.monotonic() < deadline - 5:
                attempt(partial(chain, pool, model, m, best), f"chain {model} {m}")
    print(f"all done after {time.monotonic() - begun:.0f} s")


def attempt(run: Callable[[], Any], name: str) -> Any:
    try:
        return run()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {' | '.join(str(error).splitlines()[:3])[:300]}")
        return None


# Correctness


def cases(small: bool) -> list[tuple[Form, int, int, int, torch.dtype, dict[str, Any]]]:
    """(form, m, n, k, dtype, options): every dtype, prologue and epilogue in every form."""
    k, n = (104, 37) if small else (4096, 1000)
    fma = [Form(False, 4, 256, 1, 0), Form(False, 4, 256, 1, 1), Form(False, 4, 256, 1, 3)]
    dot = [Form(True, 16, 32, 4, 2, splits=3)]
    if not small:
        fma = [Form(False, 4, 1024, 4, stages, ahead=k) for stages in (0, 1, 3)]
        dot = [Form(True, 64, 128, 4, 4, splits, ahead=256) for splits in (1, 4)]
    variants: list[dict[str, Any]] = [
        {},
        {"norm": True, "bias": True},
        {"act": "silu", "add": True},
    ]
    others = [{"act": act} for act in ("gelu", "gelu_tanh", "relu")]
    found = []
    for dtype in (torch.bfloat16, torch.float16):
        for options in variants:
            found += [(form, 3, n, k, dtype, options) for form in fma]
            found += [(form, m, n, k, dtype, options) for form in dot for m in (5, 16)]
    found += [(fma[0], 3, n, k, torch.float32, options) for options in [*variants, *others]]
    found += [(dot[-1], 8, n, k, torch.bfloat16, options) for options in others]
    # Columns that fill no block, and none that can be loaded in pairs.
    found += [(form, 2, 50, k, torch.bfloat16, {"norm": True}) for form in fma for k in (72, 75)]
    found += [(form, 9, 50, k, torch.bfloat16, {"norm": True}) for form in dot for k in (168, 75)]
    return found


def tensors(
    m: int, n: int, k: int, dtype: torch.dtype, options: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Random arguments; x's rows are apart by more than their length."""
    wide = 2 * k if "act" in options else k
    found: dict[str, Any] = {
        "x": torch.randn(m, wide + 16, device=device).to(dtype)[:, :wide],
        "weight": (torch.randn(n, k, device=device) / k**0.5).to(dtype),
    }
    if "norm" in options:
        found |= {"norm": torch.rand(k, device=device) + 0.5, "eps": EPS}
    if "act" in options:
        found["act"] = options["act"]
    if "bias" in options:
        found["bias"] = torch.randn(n, device=device).to(dtype)
    if "add" in options:
        found["add"] = torch.randn(m, n, device=device).to(dtype)
    return found


def error(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got.double() - ref.double()).norm() / ref.double().norm())


def check(todo: list[Any], device: torch.device) -> None:
    worst, failed = dict.fromkeys(TOLERANCE, 0.0), 0

    def one(form: Form, m: int, n: int, k: int, dtype: torch.dtype, options: Any) -> None:
        given = tensors(m, n, k, dtype, options, device)
        ref = twin.linear(**given)
        out = given["add"] if "add" in given else torch.full_like(ref, float("nan"))
        again = given["add"].clone() if "add" in given else torch.full_like(ref, float("nan"))
        got = skinny.run(form, **given, out=out)
        if "add" in given:
            given["add"] = again
        repeated = skinny.run(form, **given, out=again)
        wrong = error(got, ref)
        worst[dtype] = max(worst[dtype], wrong)
        if not wrong < TOLERANCE[dtype] or not torch.equal(got, repeated):
            raise ArithmeticError(f"error {wrong:.1e}, equal bits {torch.equal(got, repeated)}")

    for case in todo:
        name = f"FAIL {case}"
        failed += attempt(lambda case=case: one(*case) or True, name) is None
    errors = ", ".join(f"{str(dtype)[6:]} {value:.1e}" for dtype, value in worst.items())
    print(f"{'FAIL' if failed else 'PASS'}: {len(todo) - failed} of {len(todo)} cases; {errors}")


# Speed


def candidates(m: int, n: int, k: int, sm_count: int) -> list[Form]:
    found = []
    if m <= 4:
        warps = min(4, k // 256)
        fma = partial(Form, False, block_k=256 * warps, warps=warps)
        found += [fma(block_n=4, stages=s, ahead=a) for s in (0, 1) for a in (0, k)]
        if m == 1:
            found += [fma(block_n=8, stages=1, ahead=0), fma(block_n=8, stages=1, ahead=k)]
            found += [fma(block_n=8, stages=0, ahead=0), fma(block_n=2, stages=1, ahead=k)]
            found += [fma(block_n=4, stages=3, ahead=k), fma(block_n=8, stages=3, ahead=0)]
            if k >= 4096:
                found += [Form(False, 4, 2048, 8, 1, ahead=k)]
        else:
            found += [fma(block_n=8 if m == 2 else 2, stages=1, ahead=k)]
    if m >= 4:
        cuts = [(64, 128, 4, 4), (64, 256, 4, 3)]
        cuts += [(64, 128, 4, 3), (128, 128, 8, 3)] if m == 8 else []
        for block_n, block_k, warps, stages in cuts:
            tiles = -(-n // block_n)
            for per_sm in (1, 2, 4) if m == 8 else (2,):
                splits = max(1, min(round(per_sm * sm_count / tiles), k // (2 * block_k)))
                found += [Form(True, block_n, block_k, warps, stages, splits, 2 * block_k)]
        found += [form._replace(ahead=0) for form in found[-1:]]
    return list(dict.fromkeys(found))


@contextmanager
def overlapping(on: bool) -> Iterator[None]:
    kept = skinny.overlap
    if not on:
        skinny.overlap = lambda device: {"PDL": False}
    try:
        yield
    finally:
        skinny.overlap = kept


def jobs_of(
    wanted: Iterable[tuple[Form, int, int, torch.dtype, dict[str, Any], bool]],
) -> set[Job]:
    """Each kernel once: how many programs share K makes no difference, unless it is one."""
    return {
        (form._replace(splits=min(form.splits, 2)), m, k, dtype, tuple(sorted(options.items())), on)
        for form, m, k, dtype, options, on in wanted
    }


def compile_one(job: Job) -> str:
    """In a process of its own: the cache on disk then has the kernel. Says what failed."""
    form, m, k, dtype, options, pdl = job
    try:
        given = tensors(m, 16 * form.block_n, k, dtype, dict(options), torch.device("cuda"))
        with overlapping(pdl):
            skinny.run(form, **given)
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{job}: {' | '.join(str(failure).splitlines()[:3])[:300]}"
    return ""


def copy_rate() -> float:
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds([partial(b.copy_, a)] * 4)


def seconds(calls: list[Callable[[], Any]], replays: int = 5, warm: float = 0.0) -> float:
    """Seconds per call, of all calls in one graph: the median of some replays, behind others for
    `warm` seconds."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    until = time.monotonic() + warm
    while time.monotonic() < until:
        graph.replay()
        torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    spans = [a.elapsed_time(b) for a, b in pairwise(marks)]
    return statistics.median(spans) / 1e3 / len(calls)


def sweep(work: Iterable[Any], until: float) -> dict[tuple[int, int, int], Form]:
    """The fastest form by (m, n, k); prints it beside cuBLAS."""
    best: dict[tuple[int, int, int], Form] = {}
    weights: dict[tuple[int, int], torch.Tensor] = {}
    print("  M  product   N×K            µs   GB/s | cuBLAS µs   GB/s | form, second best")
    for name, m, n, k, forms in work:
        if time.monotonic() > until:
            break
        if (n, k) not in weights:
            copies = max(2, -(-(256 << 20) // (2 * n * k)))
            weights[n, k] = torch.empty(copies, n, k, dtype=torch.bfloat16, device="cuda")
            weights[n, k].normal_(std=k**-0.5)
        copies = weights[n, k]
        x = torch.randn(m, k, device="cuda").bfloat16()
        ref = F.linear(x, copies[0])
        times = {}
        for form in forms:
            spent = attempt(partial(time_form, form, x, copies, ref), f"{name} {m} {form}")
            if spent is not None:
                times[form] = spent
        theirs = seconds([partial(F.linear, x, w) for w in turns(copies)])
        if not times:
            continue
        ranked = sorted(times, key=times.__getitem__)
        best[m, n, k] = ranked[0]
        size = 2 * n * k / 1e9
        mine = times[ranked[0]]
        rows = [(*form, times[form] * 1e6) for form in ranked]
        record["sweep"].append({"m": m, "n": n, "k": k, "cublas": theirs * 1e6, "forms": rows})
        if m in (1, 8) or name in ("gate_up", "o"):
            print(
                f"{m:3}  {name:8} {n:6}×{k:<5} {mine * 1e6:9.2f} {size / mine:6.0f} | "
                f"{theirs * 1e6:9.2f} {size / theirs:6.0f} | {brief(ranked[0])}, "
                f"{brief(ranked[1 % len(ranked)])} {times[ranked[1 % len(ranked)]] / mine:.2f}"
            )
    return best


def brief(form: Form) -> str:
    kind = "dot" if form.dot else "fma"
    cut = f"{form.block_n}×{form.block_k} w{form.warps} s{form.stages}"
    return f"{kind} {cut} k/{form.splits} a{form.ahead}"


def turns(copies: torch.Tensor) -> list[torch.Tensor]:
    """All copies, again and again: enough that a graph's own start does not count."""
    return list(copies) * max(1, 16 // len(copies))


def time_form(form: Form, x: torch.Tensor, copies: torch.Tensor, ref: torch.Tensor) -> float:
    out = torch.full_like(ref, float("nan"))
    wrong = error(skinny.run(form, x, copies[0], out=out), ref)
    if not wrong < TOLERANCE[x.dtype]:
        raise ArithmeticError(f"error {wrong:.1e}")
    return seconds([partial(skinny.run, form, x, w, out=out) for w in turns(copies)])


# A layer's products, one after the other


def chain(pool: Any, model: str, m: int, best: dict[tuple[int, int, int], Form]) -> None:
    shapes = [SHAPES[model][name] for name in ("qkv", "o", "gate_up", "down")]
    forms = [best[m, n, k] for n, k in shapes]
    variants = {"serial": (forms, False), "overlap": (forms, True)}
    if m in (1, 8):
        # The rows of a tile of `dot` together would overflow the L2 cache.
        for name, ahead in (("overlap, ahead 0", 0), ("overlap, ahead", 4096)):
            changed = [
                form._replace(ahead=min(ahead, 512 if form.dot else k))
                for form, (_, k) in zip(forms, shapes, strict=True)
            ]
            variants[name] = (changed, True)
        late = [form._replace(early=False) for form in variants["overlap, ahead"][0]]
        variants["overlap, ahead, late"] = (late, True)
    parts = ({"norm": True}, {"add": True}, {"norm": True}, {"act": "silu", "add": True})
    jobs = jobs_of(
        (form, m, k, torch.bfloat16, options, pdl)
        for chosen, pdl in variants.values()
        for form, (_, k), options in zip(chosen, shapes, parts, strict=True)
    )
    for failure in set(pool.map(compile_one, jobs, chunksize=1)) - {""}:
        print("does not compile:", failure)
    layers = [
        [torch.randn(n, k, device="cuda").mul_(0.5 * k**-0.5).bfloat16() for n, k in shapes]
        for _ in range(LAYERS[model])
    ]
    hidden = shapes[0][1]
    x = torch.randn(m, hidden, device="cuda").bfloat16()
    norm = torch.ones(hidden, device="cuda")
    size = sum(2 * n * k for n, k in shapes) * len(layers)
    theirs = seconds([partial(torch_chain, x, norm, layers)])
    record["chain"].append({"model": model, "m": m, "form": "cublas", "us": theirs * 1e6})
    print(f"chain {model} M={m}: cuBLAS {theirs * 1e6:.0f} µs, {size / theirs / 1e9:.0f} GB/s")
    ref = torch_chain(x.clone(), norm, layers)
    for name, (chosen, pdl) in variants.items():
        with overlapping(pdl):
            wrong = error(our_chain(chosen, x.clone(), norm, layers), ref)
            mine = seconds([partial(our_chain, chosen, x.clone(), norm, layers)])
        record["chain"].append({"model": model, "m": m, "form": name, "us": mine * 1e6})
        print(
            f"   {name:20} {mine * 1e6:6.0f} µs, {mine * 1e6 / len(layers):6.2f} a layer, "
            f"{size / mine / 1e9:.0f} GB/s, {theirs / mine:.2f}×, error {wrong:.0e}"
        )


def our_chain(
    forms: list[Form], x: torch.Tensor, norm: torch.Tensor, layers: list[list[torch.Tensor]]
) -> torch.Tensor:
    for qkv, o, gate_up, down in layers:
        both = skinny.run(forms[0], x, qkv, norm=norm, eps=EPS)
        skinny.run(forms[1], both[:, : o.shape[1]], o, add=x, out=x)
        both = skinny.run(forms[2], x, gate_up, norm=norm, eps=EPS)
        skinny.run(forms[3], both, down, act="silu", add=x, out=x)
    return x


def torch_chain(
    x: torch.Tensor, norm: torch.Tensor, layers: list[list[torch.Tensor]]
) -> torch.Tensor:
    norm = norm.bfloat16()
    for qkv, o, gate_up, down in layers:
        both = F.linear(F.rms_norm(x, norm.shape, norm, EPS), qkv)
        x = torch.addmm(x, both[:, : o.shape[1]], o.t())
        gate, up = F.linear(F.rms_norm(x, norm.shape, norm, EPS), gate_up).chunk(2, -1)
        x = torch.addmm(x, F.silu(gate).mul_(up), down.t())
    return x


if __name__ == "__main__":
    main()
