"""Checks and times the small kernels between the products: norms, rotary, gate, draw, step.

    python benchmarks/kernels/fused.py --seconds 60 --json fused.json

Every kernel is compared with its plain-torch twin (fused_checks.py), then timed in CUDA graphs: the
candidates of its `shape` function, what `shape` returns with and without programmatic dependent
launch, and the usual torch operators. Times are per launch in a chain, so they include the gap
between kernels. Activations up to 60 MB lie in the L2 cache, as they do in a model; larger ones
rotate. `--smoke` only checks, on tiny shapes: on CPU with TRITON_INTERPRET=1.
"""

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import fused_checks as checks
import torch
import torch.nn.functional as F
from fused_checks import BF16, DEVICE, DIM, FP32, captured, floats, frequencies

from kvrun.runtime.kernels import rotary
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.triton import draw as t_draw
from kvrun.runtime.kernels.triton import gated as t_gated
from kvrun.runtime.kernels.triton import norm as t_norm
from kvrun.runtime.kernels.triton import rotary as t_rotary
from kvrun.runtime.kernels.triton import step as t_step

MODELS = {
    "8B": {"size": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocab": 128256},
    "0.6B": {"size": 1024, "inner": 3072, "heads": 16, "kv_heads": 8, "vocab": 151936},
}
CAPPED = 256_000, 30.0  # Gemma 2's vocabulary, and the cap of its logits
L2 = 60 << 20


@dataclass(frozen=True)
class Work:
    """A kernel at one shape: calls on rotating buffers, the bytes each moves, and torch's way."""

    kernel: str
    model: str
    tokens: int
    module: ModuleType
    ours: list[Callable[[], Any]]
    torch: list[Callable[[], Any]] | None
    bytes: int
    candidates: tuple[tuple[int, ...], ...]
    usual_shape: tuple[int, ...] | None  # the arguments of the module's `shape`


def copies(size: int) -> int:
    """As many as exceed the L2 cache, but small things lie there in a model too: 8 of those."""
    return min(8, max(2, 2 * L2 // size + 1))


def norm_work(model: str, tokens: int) -> Work:
    size = MODELS[model]["size"]
    weight, half = torch.rand(size, device=DEVICE), torch.rand(size, device=DEVICE).to(BF16)
    moved = 4 * tokens * size * 2
    sets = [
        [floats(tokens, size, dtype=BF16) for _ in range(3)] for _ in range(copies(moved * 3 // 4))
    ]

    def usual(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(residual.add_(x), (size,), half, 1e-5)

    wide = ((1, 4), (1, 8), (1, 16), (2, 8))
    narrow = ((1, 1), (1, 2), (1, 4), (2, 4), (4, 4), (8, 8))
    return Work(
        "add_rms_norm", model, tokens, t_norm,
        [lambda s=s: t_norm.add_rms_norm(s[0], s[1], weight, 1e-5, out=s[2]) for s in sets],
        [lambda s=s: usual(s[0], s[1]) for s in sets], moved,
        wide if size > 1024 else narrow, (tokens, size),
    )  # fmt: skip


def gated_work(model: str, tokens: int) -> Work:
    inner = MODELS[model]["inner"]
    moved = 3 * tokens * inner * 2
    sets = [
        (floats(tokens, 2 * inner, dtype=BF16), floats(tokens, inner, dtype=BF16))
        for _ in range(copies(moved))
    ]
    return Work(
        "gated silu", model, tokens, t_gated,
        [lambda s=s: t_gated.gated(s[0], "silu", out=s[1]) for s in sets],
        [lambda s=s: F.silu(s[0][:, :inner]).mul_(s[0][:, inner:]) for s in sets], moved,
        ((512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8), (4096, 8)), (tokens, inner),
    )  # fmt: skip


def rotary_work(model: str, tokens: int) -> Work:
    heads, kv = MODELS[model]["heads"], MODELS[model]["kv_heads"]
    total = heads + 2 * kv
    moved = 2 * DIM * tokens * (2 * (heads + kv) + 3 * kv)
    sets = [floats(tokens, total * DIM, dtype=BF16) for _ in range(copies(moved))]
    cache = floats(max(4096, tokens), 2 * kv * DIM, dtype=BF16)
    slots = torch.randperm(len(cache), device=DEVICE)[:tokens]
    cos, sin = rotary.tables(torch.arange(tokens, device=DEVICE), frequencies(DIM), 1.0)
    norms: dict[str, Any] = {}
    ones, half = torch.ones(DIM, device=DEVICE), torch.ones(DIM, device=DEVICE, dtype=BF16)
    if model == "0.6B":
        norms = {"q_weight": ones, "k_weight": ones, "eps": 1e-6}
    both = [torch.cat((t, t), 1)[:, None].to(BF16) for t in (cos, sin)]

    def usual(qkv: torch.Tensor) -> None:
        x = qkv.view(tokens, total, DIM)
        for part in (x[:, :heads], x[:, heads : heads + kv]):
            y = F.rms_norm(part, (DIM,), half, 1e-6) if norms else part
            a, b = y.chunk(2, -1)
            part.copy_(y * both[0] + torch.cat((-b, a), -1) * both[1])
        cache.index_copy_(0, slots, qkv[:, heads * DIM :])

    rotation = Rotation(cos, sin, **norms)
    return Work(
        "rotate_append" + (" +norm" if norms else ""), model, tokens, t_rotary,
        [lambda s=s: t_rotary.rotate_append(s, rotation, cache, slots, kv, DIM) for s in sets],
        [lambda s=s: usual(s) for s in sets], moved,
        ((2, 1), (4, 1), (4, 2), (8, 2), (8, 4), (16, 4), (16, 8)), (tokens, total, DIM),
    )  # fmt: skip


def draw_work(model: str, rows: int, dtype: torch.dtype, greedy: bool) -> Work:
    vocab, cap = (MODELS[model]["vocab"], None) if model in MODELS else CAPPED
    moved = rows * vocab * dtype.itemsize
    sets = [floats(rows, vocab, dtype=dtype, scale=3.0) for _ in range(copies(moved))]
    temperature = torch.full((rows,), 0.0 if greedy else 0.8, device=DEVICE)
    keys, positions = checks.keyed(rows), torch.arange(rows, device=DEVICE)
    out = torch.empty_like(positions), torch.empty(rows, dtype=torch.bool, device=DEVICE)

    def usual(logits: torch.Tensor) -> torch.Tensor:
        if cap is not None:
            logits = logits.float().div_(cap).tanh_().mul_(cap)
        if greedy:
            return logits.argmax(-1)
        odds = (logits.float() / temperature[:, None]).softmax(-1)
        return odds.div_(torch.empty_like(odds).exponential_(1)).argmax(-1)

    tuned = t_draw.SHAPES
    return Work(
        f"draw {'greedy' if greedy else 'drawn'} {str(dtype)[6:]}", model, rows, t_draw,
        [lambda s=s: t_draw.draw(s, temperature, keys, positions, cap=cap, out=out) for s in sets],
        [lambda s=s: usual(s) for s in sets], moved,
        tuned if model != "0.6B" and not greedy else (), (rows, vocab),
    )  # fmt: skip


def step_work(rows: int) -> Work:
    of, into = checks.state(rows + 1, 640, 4096), checks.empty_step(rows, 640)
    slots = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    ids = torch.zeros(rows, dtype=torch.int64, device=DEVICE)

    def ours() -> None:
        t_step.prepare(slots, of, into, 16)
        t_step.advance(slots, ids, of)

    return Work("prepare, advance", "any", rows, t_step, [ours], None, 0, (), None)


def tables_work(tokens: int) -> Work:
    positions, of = torch.arange(tokens, device=DEVICE), frequencies(DIM)
    return Work(
        "tables", "any", tokens, t_rotary, [lambda: t_rotary.tables(positions, of, 1.0)],
        [lambda: rotary.tables(positions, of, 1.0)], 0, (), None,
    )  # fmt: skip


def layer_work(model: str) -> Work:
    """The four small kernels of a layer one after another, at one token."""
    parts = [norm_work(model, 1), rotary_work(model, 1), norm_work(model, 1), gated_work(model, 1)]
    ours = [p.ours[i % len(p.ours)] for i in range(8) for p in parts]
    usual = [p.torch[i % len(p.torch)] for i in range(8) for p in parts if p.torch]
    return Work("norm, rotate, norm, gate", model, 1, t_norm, ours, usual, 0, (), None)


choice = threading.local()


def steer() -> None:
    """Lets a thread choose what `shape` returns, and whether launches overlap."""
    for module in (t_norm, t_gated, t_rotary, t_draw, t_step):
        overlap, shape = module.overlap, getattr(module, "shape", None)

        def overlapping(device: torch.device, usual: Any = overlap) -> dict[str, Any]:
            return usual(device) if getattr(choice, "pdl", True) else {"PDL": False}

        def chosen(*args: int, usual: Any = shape) -> tuple[int, ...]:
            return getattr(choice, "shape", None) or usual(*args)

        module.overlap = overlapping
        if shape is not None:
            module.shape = chosen


def warm(work: Work, shape: tuple[int, ...] | None, pdl: bool) -> None:
    choice.shape, choice.pdl = shape, pdl
    work.ours[0]()
    choice.shape, choice.pdl = None, True


def timed(calls: list[Callable[[], Any]], launches: int) -> float:
    """Microseconds of one call, in a chain of them in a CUDA graph; the best of three."""
    for call in calls[:3]:
        call()
    torch.cuda.synchronize()
    replay = captured(lambda: [calls[i % len(calls)]() for i in range(launches)])
    replay()
    torch.cuda.synchronize()
    best = float("inf")
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 500 / launches)
    return best


def every_work() -> Iterator[Callable[[], Work]]:
    for tokens in (256, 1, 8192, 32, 8):  # what matters most first
        for model in MODELS:
            yield lambda m=model, t=tokens: norm_work(m, t)
            yield lambda m=model, t=tokens: rotary_work(m, t)
            yield lambda m=model, t=tokens: gated_work(m, t)
            if tokens <= 256:
                yield lambda m=model, t=tokens: draw_work(m, t, BF16, False)
            if tokens in (1, 256):
                yield lambda m=model, t=tokens: draw_work(m, t, FP32, False)
                yield lambda m=model, t=tokens: draw_work(m, t, BF16, True)
            if tokens == 1:
                yield lambda m=model: layer_work(m)
        if tokens in (1, 256):
            yield lambda t=tokens: draw_work("Gemma 2", t // 4 or 1, BF16, False)
            yield lambda t=tokens: tables_work(t)
            yield lambda t=tokens: step_work(t)


def compile_all(works: list[Callable[[], Work]]) -> None:
    """Compiles in threads what will be timed; the number of tokens is no constant of a kernel."""
    jobs: dict[Any, Callable[[], None]] = {}
    for make in works:
        work = make()
        for shape in work.candidates:
            key = work.kernel, work.model, shape, True
            jobs.setdefault(key, lambda w=work, s=shape: warm(w, s, True))
        usual = None if work.usual_shape is None else work.module.shape(*work.usual_shape)
        for pdl in (True, False):
            key = work.kernel, work.model, usual, pdl
            jobs.setdefault(key, lambda w=work, p=pdl: warm(w, None, p))

    def quietly(job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as e:  # the timing will meet it again
            print("compile:", " ".join(str(e).split())[:200])

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(quietly, jobs.values()))


def measure(work: Work) -> dict[str, Any]:
    launches = 100 if work.bytes < 20 << 20 else 20
    by_shape: dict[str, float] = {}
    for shape in work.candidates:
        choice.shape = shape
        by_shape[str(shape)] = timed(work.ours, launches)
    choice.shape = None
    us = timed(work.ours, launches)
    choice.pdl = False
    alone = timed(work.ours, launches)
    choice.pdl = True
    return {
        "kernel": work.kernel,
        "model": work.model,
        "tokens": work.tokens,
        "us": us,
        "gb_s": work.bytes / us / 1e3,
        "us_without_pdl": alone,
        "us_torch": timed(work.torch, launches) if work.torch else None,
        "best": min(by_shape, key=lambda shape: by_shape[shape], default=None),
        "us_of_shapes": by_shape,
    }


def report(results: list[dict[str, Any]]) -> None:
    print(
        "us per launch in a chain (GB/s) | without PDL | torch's operators | the best shape tried"
    )
    for r in sorted(results, key=lambda r: (r["kernel"], r["model"], r["tokens"])):
        usual = f"{r['us_torch']:7.1f}" if r["us_torch"] else "      -"
        best = f"{r['best']} {r['us_of_shapes'][r['best']]:.2f}" if r["best"] else ""
        print(
            f"{r['kernel'][:24]:24} {r['model']:>4} {r['tokens']:>4} {r['us']:7.2f} "
            f"({r['gb_s']:4.0f}) | {r['us_without_pdl']:7.2f} | {usual} | {best}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="start no work after these")
    parser.add_argument("--json", help="write everything here")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no timing")
    args = parser.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu", torch.__version__)
    found, results = checks.run_all(args.smoke), []
    print(f"checked after {time.perf_counter() - start:.1f} s")
    if not args.smoke:
        steer()
        works = list(every_work())
        compile_all([*works])
        print(f"compiled after {time.perf_counter() - start:.1f} s")
        for make in works:
            if time.perf_counter() - start > args.seconds:
                print("out of time")
                break
            try:
                results.append(measure(make()))
            except Exception as e:
                choice.shape, choice.pdl = None, True
                print("FAIL", " ".join(str(e).split())[:300])
        report(results)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"checks": found, "times": results}, file, indent=1)
    print(f"done after {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
