"""Paged attention on a GPU: is every kernel right at real sizes, and which cut is fastest where?

    python benchmarks/kernels/paged_attention.py --seconds 70 --json paged_attention.json

Compiling is most of the work, so processes of their own compile and check what they compiled; then
one process times what is right, in CUDA graphs whose layers have caches of their own, larger than
L2. `--smoke` with TRITON_INTERPRET=1 runs the checks on small shapes without a GPU.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvrun.runtime.kernels import paged_attention as twin
from kvrun.runtime.kernels.triton import _decode, _prefill
from kvrun.runtime.kernels.triton import paged_attention as fast

BF16, F16, F32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
TOLERANCE = {BF16: 6e-3, F16: 1.5e-3, F32: 5e-6}
LLAMA, QWEN, TINY = (32, 8, 128), (16, 8, 128), (4, 2, 64)
MODEL_LEN = 10240  # block tables are as wide as an engine's
BESIDE_L2 = 256 << 20

# What is measured: (keys, warps, stages).
DECODE = [
    (64, 4, 3), (64, 4, 2), (64, 4, 4), (32, 4, 3), (32, 4, 4), (32, 2, 4), (32, 4, 6), (128, 4, 2),
    (128, 8, 3), (64, 8, 3),
]  # fmt: skip
DECODE_AGAIN = [(64, 4, 3), (32, 4, 4), (64, 4, 2)]
PROGRAMS = [264, 528, 1056]
# (rows, keys, warps, stages, packed)
PREFILL = [
    (128, 64, 8, 3, False), (128, 64, 8, 2, False), (128, 128, 8, 2, False),
    (128, 64, 4, 3, False), (128, 32, 8, 4, False), (64, 64, 4, 3, False),
    (64, 64, 4, 2, False), (64, 128, 4, 2, False), (64, 32, 4, 3, False),
]  # fmt: skip
PREFILL_PAGED = PREFILL[:7]
PREFILL_PACKED = [(64, 64, 4, 2, True), (64, 64, 4, 3, True), (64, 32, 4, 3, True)]


@dataclass
class Case:
    """One call: its sequences as (tokens in the cache, queries), and how it is cut."""

    heads: tuple[int, int, int]  # query heads, kv heads, head dim
    sequences: list[tuple[int, int]]
    dtype: torch.dtype = BF16
    fp8: bool = False
    page: int = 16
    extra: tuple[str, ...] = ()
    fresh: bool = False
    padding: int = 0  # rows of q behind the last sequence
    idle: int = 3  # sequences of no queries; of a decode, as many as rows of padding
    decode: bool = True
    tiling: tuple[Any, ...] | None = None

    def name(self) -> str:
        kind = "decode" if self.decode else "fresh" if self.fresh else "paged"
        cache = "fp8" if self.fp8 else str(self.dtype)[6:]
        words = [kind, "{}/{}x{}".format(*self.heads), cache, f"page{self.page}", *self.extra]
        return " ".join(words) + (f" {self.tiling}" if self.tiling else "")


def options_of(case: Case, device: torch.device) -> twin.Options:
    heads, kv_heads, dim = case.heads
    line = torch.linspace(-1.0, 1.0, heads, device=device)
    return twin.Options(
        case.page,
        kv_heads,
        dim,
        dim**-0.5,
        window=100 if "window" in case.extra else None,
        softcap=2.0 if "softcap" in case.extra else None,
        alibi=torch.exp2(-4 + line * 3) if "alibi" in case.extra else None,
        sinks=line * 3 if "sinks" in case.extra else None,
    )


def arguments(case: Case, device: torch.device, seed: int = 0) -> dict[str, torch.Tensor]:
    """q, k, v as views of one buffer; pages in random order; NaN wherever nothing may look."""
    generator = torch.Generator(device).manual_seed(seed)
    heads, kv_heads, dim = case.heads
    idle = [0] * (case.padding if case.decode else case.idle)
    contexts = [known + new for known, new in case.sequences] + idle
    news = [new for _, new in case.sequences] + idle
    pages = [-(-length // case.page) for length in contexts]
    blocks = 1 + sum(pages)
    order = (torch.randperm(blocks - 1, generator=generator, device=device) + 1).int()
    tables = torch.zeros(len(contexts), max(*pages, 1) + 3, dtype=torch.int32, device=device)
    cache = torch.randn(blocks * case.page, 2, kv_heads, dim, generator=generator, device=device)
    cache = cache.to(case.dtype)
    tokens = sum(news) + case.padding
    buffer = torch.randn(
        tokens, heads + 2 * kv_heads, dim, generator=generator, device=device
    ).to(case.dtype)  # fmt: skip
    q, k, v = buffer.split([heads, kv_heads, kv_heads], 1)
    cache[: case.page] = float("nan")
    buffer[sum(news) :] = float("nan")
    used = row = 0
    for i, (length, new) in enumerate(zip(contexts, news, strict=True)):
        mine = order[used : used + pages[i]]
        tables[i, : pages[i]] = mine
        slots = (mine.long()[:, None] * case.page + torch.arange(case.page, device=device)).view(-1)
        cache[slots[length:]] = float("nan")
        cache[slots[length - new : length], 0] = k[row : row + new]
        cache[slots[length - new : length], 1] = v[row : row + new]
        used, row = used + pages[i], row + new
    starts = torch.tensor([0, *itertools.accumulate(news)], dtype=torch.int32, device=device)
    return {
        "q": q, "k": k, "v": v, "block_tables": tables, "cu_seqlens": starts,
        "cache": cache.view(len(cache), -1).to(FP8) if case.fp8 else cache.view(len(cache), -1),
        "context_lens": torch.tensor(contexts, dtype=torch.int32, device=device),
    }  # fmt: skip


def call(case: Case, options: twin.Options, given: dict[str, torch.Tensor], module: Any) -> Any:
    """The case on the twin, on the kernels as they are, or on the kernels with the case's cut."""
    q, cache, tables = given["q"], given["cache"], given["block_tables"]
    lengths, starts = given["context_lens"], given["cu_seqlens"]
    longest = max(new for _, new in case.sequences)
    out = torch.full((len(q), q[0].numel()), float("nan"), dtype=q.dtype, device=q.device)
    if module is None and case.decode:
        tiling = _decode.Tiling(*case.tiling, 528)
        _decode.launch(q, cache, tables, lengths, options, out, tiling)
    elif module is None:
        cut = _prefill.Tiling(*case.tiling)
        _prefill.launch(
            q, given["k"], given["v"], cache, tables, starts, lengths, options, case.fresh, out, cut
        )
    elif case.decode:
        module.decode(q, cache, tables, lengths, options, out=out)
    else:
        module.prefill(
            q, given["k"], given["v"], cache, tables, starts, lengths, options,
            max_query_len=longest, fresh=case.fresh, out=out,
        )  # fmt: skip
    return out


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm())


def check(case: Case, device: torch.device) -> str | None:
    """What is wrong with a case, or None."""
    options, given = options_of(case, device), arguments(case, device)
    wanted = call(case, options, given, twin)
    for _ in range(2):
        found = call(case, options, given, fast if case.tiling is None else None)
        error = difference(found, wanted)
        if not error <= TOLERANCE[case.dtype]:
            return f"error {error:.2e}"
    again = call(case, options, given, fast if case.tiling is None else None)
    return None if torch.equal(found, again) else "a second run differs"


def checks(smoke: bool) -> list[Case]:
    ragged = [(0, 1), (15, 1), (16, 1), (63, 1), (64, 1), (127, 1), (1023, 1), (4000, 1), (575, 1)]
    mixed = [(0, 1), (700, 1), (0, 64), (33, 128), (1000, 200), (0, 513), (64, 7), (4095, 1)]
    short = [(700, 1), (0, 5), (300, 8), (64, 16), (15, 3)]
    fresh = [(0, 1), (0, 511), (0, 128), (0, 64), (0, 130), (0, 1000)]
    if smoke:
        ragged, mixed = [(0, 1), (15, 1), (127, 1), (63, 1)], [(70, 1), (0, 16), (33, 40)]
        short, fresh = [(70, 1), (0, 5), (30, 8)], [(0, 1), (0, 33), (0, 16)]
    every = ("window", "softcap", "alibi", "sinks")
    many, llama = (3, (8, 2, 64)) if smoke else (40, LLAMA)
    shapes = [llama, TINY, (14, 2, 128), (3, 3, 80), (8, 2, 96), (8, 1, 256), (32, 2, 64)]
    found = []
    plain = Case(llama, ragged, padding=3)
    found += [replace(plain, heads=shape) for shape in shapes]
    found += [replace(plain, extra=(name,)) for name in every]
    found += [
        replace(plain, extra=every), replace(plain, fp8=True), replace(plain, page=64),
        replace(plain, page=32, heads=(12, 4, 64)), replace(plain, dtype=F16),
        replace(plain, dtype=F32, heads=TINY), replace(plain, dtype=F32, heads=(14, 2, 80)),
        replace(plain, dtype=F32, heads=TINY, extra=every),
        replace(plain, heads=shapes[2], fp8=True), replace(plain, sequences=ragged * many),
        replace(plain, sequences=[(100 * many + 3, 1)], padding=0),
    ]  # fmt: skip
    step = Case(llama, mixed, decode=False, padding=5)
    found += [replace(step, heads=shape) for shape in shapes]
    found += [replace(step, sequences=short, heads=shape) for shape in shapes[:3]]
    found += [replace(step, extra=(name,)) for name in every]
    found += [
        replace(step, extra=every), replace(step, fp8=True), replace(step, page=64),
        replace(step, dtype=F16), replace(step, dtype=F32, heads=TINY),
        replace(step, sequences=short, extra=every), replace(step, sequences=short, fp8=True),
        replace(step, sequences=short, dtype=F32, heads=TINY, extra=every),
    ]  # fmt: skip
    step = replace(step, sequences=fresh, fresh=True)
    found += [replace(step, heads=shape) for shape in (llama, TINY, (8, 1, 256), (3, 3, 80))]
    found += [replace(step, extra=every), replace(step, dtype=F32, heads=TINY)]
    if smoke:
        return found
    found += [replace(plain, tiling=t) for t in DECODE]
    found += [replace(plain, tiling=t, sequences=[(2000, 1)], padding=0) for t in DECODE]
    for heads, page, fp8 in ((LLAMA, 64, False), (QWEN, 16, False), (LLAMA, 16, True)):
        again = replace(plain, heads=heads, page=page, fp8=fp8)
        found += [replace(again, tiling=t) for t in DECODE_AGAIN]
        if not fp8:
            again = replace(again, sequences=[(2000, 1)], padding=0)
            found += [replace(again, tiling=t) for t in DECODE_AGAIN]
    found += [replace(step, tiling=t) for t in PREFILL]
    paged = replace(step, sequences=mixed, fresh=False)
    found += [replace(paged, tiling=t) for t in PREFILL_PAGED]
    found += [replace(paged, sequences=short, tiling=t) for t in PREFILL_PACKED]
    return found


def attempt(case: Case, device: torch.device) -> str | None:
    try:
        return check(case, device)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:300]} ({last.filename}:{last.lineno})"


def worker(cases: list[tuple[int, Case]], results: Any) -> None:
    device = torch.device("cuda")
    for index, case in cases:
        failure = attempt(case, device)
        results.put((index, failure))
        if failure is not None and ("CUDA error" in failure or "illegal" in failure):
            break


def checked(cases: list[Case], device: torch.device, seconds: float) -> list[str | None]:
    """The failure of each case, tried in processes that share the device."""
    outcomes: list[str | None] = ["did not run"] * len(cases)
    if device.type == "cpu":
        return [attempt(case, device) for case in cases]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    count = max(1, min(14, (os.cpu_count() or 2) - 2))
    numbered = list(enumerate(cases))
    workers = [
        context.Process(target=worker, args=(numbered[i::count], results), daemon=True)
        for i in range(count)
    ]
    for process in workers:
        process.start()
    deadline, missing = time.monotonic() + seconds, len(cases)
    while missing and time.monotonic() < deadline:
        try:
            index, outcomes[index] = results.get(timeout=0.5)
            missing -= 1
        except queue.Empty:
            if not any(process.is_alive() for process in workers):
                break
    for process in workers:
        process.kill()
    for process in workers:
        process.join()
    return outcomes


def replayed(device: torch.device) -> Iterator[tuple[str, str | None]]:
    """Captured once, then replayed with other lengths, pages, queries: still what the twin says."""
    for fresh in (None, False, True):
        decode = fresh is None
        one = [(0, 1), (900, 1), (40, 1), (17, 1)] if decode else [(0, 90), (0, 7), (0, 200)]
        two = [(700, 1), (3, 1), (0, 1), (2500, 1)] if decode else [(0, 1), (0, 150), (0, 80)]
        tiling = (64, 4, 3) if decode else None
        name = f"replay {'decode' if decode else 'prefill'} {'fresh' if fresh else ''}"
        first = Case(
            LLAMA, one, decode=decode, fresh=bool(fresh), padding=4 if decode else 33, tiling=tiling
        )
        second = replace(first, sequences=two, padding=4 if decode else 99)
        try:
            yield name, _replayed(first, second, device)
        except Exception as error:
            yield name, f"{type(error).__name__}: {str(error)[:300]}"


def _replayed(first: Case, second: Case, device: torch.device) -> str | None:
    options = options_of(first, device)
    given = arguments(first, device)
    given["cache"] = torch.cat([given["cache"]] * 6)
    wide = torch.zeros(len(given["block_tables"]), 300, dtype=torch.int32, device=device)
    wide[:, : given["block_tables"].shape[1]] = given["block_tables"]
    given["block_tables"] = wide
    module = None if first.tiling else fast
    call(first, options, given, module)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(first, options, given, module)
    for case, seed in ((first, 0), (second, 1), (first, 2)):
        new = arguments(case, device, seed)
        for name in ("q", "k", "v", "context_lens", "cu_seqlens"):
            given[name].copy_(new[name])
        given["cache"][: len(new["cache"])] = new["cache"]
        given["block_tables"].zero_()
        given["block_tables"][:, : new["block_tables"].shape[1]] = new["block_tables"]
        graph.replay()
        error = difference(out, call(case, options, given, twin))
        if not error <= TOLERANCE[BF16]:
            return f"seed {seed}: error {error:.2e}"
    return None


def graph_seconds(launches: list[Callable[[], None]]) -> float:
    """Seconds of one launch among many that a graph replays; the best of three."""
    launches[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # torch.cuda.graph would also collect garbage, which takes longer than what is measured.
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        for launch in launches:
            launch()
        graph.capture_end()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay(times: int) -> float:
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    once = replay(1)
    times = max(1, min(20, int(4e-3 / once)))
    return min(replay(times) for _ in range(3)) / len(launches)


class Bench:
    """Times cuts on one device, keeps all results, and stops starting new ones at a deadline."""

    def __init__(self, device: torch.device, deadline: float) -> None:
        self.device, self.deadline = device, deadline
        self.results: list[dict[str, Any]] = []
        self.broken: set[tuple[Any, ...]] = set()
        self._pools: dict[Any, torch.Tensor] = {}

    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def pool(self, slots: int, width: int, fp8: bool) -> torch.Tensor:
        """Random rows for every cache; zeros would run faster than real data."""
        key = (width, fp8)
        if key not in self._pools or len(self._pools[key]) < slots:
            self._pools.pop(key, None)
            rows = torch.empty(slots, width, dtype=BF16, device=self.device).normal_()
            self._pools[key] = rows.to(FP8) if fp8 else rows
        return self._pools[key]

    def caches(self, slots: int, width: int, fp8: bool) -> list[torch.Tensor]:
        size = slots * width * (1 if fp8 else 2)
        copies = max(2, min(32, -(-BESIDE_L2 // size)))
        rows = self.pool(max(slots * copies, 600_000), width, fp8)
        return list(rows[: slots * copies].split(slots))

    def tables(self, batch: int, context: int, page: int) -> tuple[torch.Tensor, int]:
        pages = -(-context // page)
        order = torch.randperm(batch * pages, device=self.device).int().view(batch, pages)
        tables = torch.zeros(batch, -(-MODEL_LEN // page), dtype=torch.int32, device=self.device)
        tables[:, :pages] = order
        return tables, batch * pages * page

    def keep(self, seconds: float, work: float, unit: str, **facts: Any) -> dict[str, Any]:
        result = {"us": seconds * 1e6, unit: work / seconds / 1e12, **facts}
        self.results.append(result)
        return result

    def decode(
        self, heads: Any, batch: int, context: int, page: int, cuts: list[Any], fp8: bool = False
    ) -> list[dict[str, Any]]:
        """Every cut at one shape, fastest first; the rate counts keys and values only."""
        query_heads, kv_heads, dim = heads
        options = twin.Options(page, kv_heads, dim, dim**-0.5)
        tables, slots = self.tables(batch, context, page)
        caches = self.caches(slots, 2 * kv_heads * dim, fp8)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=self.device)
        q = torch.randn(batch, query_heads + 2 * kv_heads, dim, device=self.device).to(BF16)
        q, out = (
            q[:, :query_heads],
            torch.empty(batch, query_heads * dim, device=self.device).bfloat16(),
        )
        found = []
        for cut in cuts:
            if self.late():
                break
            tiling = _decode.Tiling(*cut)
            launches = [
                lambda cache=cache, tiling=tiling: _decode.launch(
                    q, cache, tables, lengths, options, out, tiling
                )
                for cache in caches * max(1, 16 // len(caches))
            ]
            with contextlib.suppress(Exception):
                work = batch * context * caches[0].shape[1] * caches[0].element_size()
                found.append(self.keep(
                    graph_seconds(launches), work, "TB/s", kind="decode", heads=heads, batch=batch,
                    context=context, page=page, fp8=fp8, cut=cut,
                ))  # fmt: skip
        return sorted(found, key=lambda result: result["us"])

    def prefill(
        self, heads: Any, batch: int, known: int, new: int, cuts: list[Any], fresh: bool
    ) -> list[dict[str, Any]]:
        """Every cut at one shape, fastest first; the rate counts visible keys only."""
        query_heads, kv_heads, dim = heads
        options = twin.Options(16, kv_heads, dim, dim**-0.5)
        tables, slots = self.tables(batch, known + new, 16)
        cache = self.caches(slots, 2 * kv_heads * dim, False)[0]
        lengths = torch.full((batch,), known + new, dtype=torch.int32, device=self.device)
        starts = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * new
        tokens = batch * new
        qkv = torch.randn(tokens, query_heads + 2 * kv_heads, dim, device=self.device).to(BF16)
        q, k, v = qkv.split([query_heads, kv_heads, kv_heads], 1)
        out = torch.empty(tokens, query_heads * dim, dtype=BF16, device=self.device)
        found = []
        for cut in cuts:
            if self.late():
                break
            tiling = _prefill.Tiling(*cut)
            launches = [
                lambda tiling=tiling: _prefill.launch(
                    q, k, v, cache, tables, starts, lengths, options, fresh, out, tiling
                )
            ] * 2
            with contextlib.suppress(Exception):
                work = 4.0 * query_heads * dim * batch * new * (known + (new + 1) / 2)
                found.append(self.keep(
                    graph_seconds(launches), work, "TFLOP/s", kind="fresh" if fresh else "paged",
                    heads=heads, batch=batch, context=known + new, queries=new, cut=cut,
                ))  # fmt: skip
        return sorted(found, key=lambda result: result["us"])


def show(results: list[dict[str, Any]]) -> None:
    if not results:
        return
    best = results[0]
    unit = "TB/s" if "TB/s" in best else "TFLOP/s"
    shape = "{}/{}x{}".format(*best["heads"])
    about = f"{best['kind']} {shape} {best['batch']:>3} x {best.get('queries', best['context'])}"
    about += f" of {best['context']}" if "queries" in best else f" page {best['page']}"
    others = "  ".join(f"{r['us']:.1f} {compact(r['cut'])}" for r in results[1:3])
    print(
        f"{about:34}{' fp8' if best.get('fp8') else '':4} {best['us']:8.1f} us {best[unit]:6.2f}"
        f" {unit} {compact(best['cut'])} | {others} | worst {results[-1]['us']:.1f}",
        flush=True,
    )


def compact(cut: tuple[Any, ...]) -> str:
    return ",".join(str(int(x)) for x in cut)


def with_programs(cuts: list[Any], counts: list[int]) -> list[Any]:
    return [(*cut, count) for cut in cuts for count in counts]


def measure(bench: Bench) -> None:
    print("decode cut: keys,warps,stages,programs; prefill: rows,keys,warps,stages,packed")
    shapes = [
        (b, c) for c in (576, 1024, 4096) for b in (1, 8, 32, 64, 128, 256) if b * c < 300_000
    ]
    rows = bench.prefill
    for fresh in (True, False):
        cuts = PREFILL if fresh else PREFILL_PAGED
        usable = [t for t in cuts if t not in bench.broken]
        show(rows(LLAMA, 8, 0, 2048, usable, fresh))
        best = rows(LLAMA, 1, 0, 8192, usable, fresh)
        show(best)
        few = [result["cut"] for result in best[:3]]
        show(rows(LLAMA, 8, 0, 8192, few, fresh))
        show(rows(LLAMA, 1, 0, 512, usable, fresh))
    usable = [t for t in [*PREFILL_PACKED, PREFILL[0], PREFILL[6]] if t not in bench.broken]
    show(rows(LLAMA, 64, 1020, 4, usable, False))
    show(rows(LLAMA, 32, 992, 32, usable, False))
    show(rows(LLAMA, 4, 1024, 256, usable, False))
    usable = [t for t in DECODE if t not in bench.broken]
    for batch, context in shapes:
        first = bench.decode(LLAMA, batch, context, 16, with_programs(usable, [528]))
        few = [r["cut"][:3] for r in first[:3]]
        more = bench.decode(LLAMA, batch, context, 16, with_programs(few, [264, 1056]))
        show(sorted(first + more, key=lambda result: result["us"]))
    few = with_programs([t for t in DECODE_AGAIN if t not in bench.broken], PROGRAMS)
    for batch, context in [(1, 576), (8, 576), (64, 576), (64, 1024), (256, 1024)]:
        show(bench.decode(LLAMA, batch, context, 64, few))
        show(bench.decode(QWEN, batch, context, 16, few))
    show(bench.decode(LLAMA, 64, 1024, 16, few, fp8=True))
    show(bench.decode(LLAMA, 256, 1024, 16, few, fp8=True))


def flash(device: torch.device) -> None:
    """What torch's own kernel does with the same work."""
    q, k, v = (torch.randn(8, heads, 2048, 128, device=device).to(BF16) for heads in (32, 8, 8))
    attention = torch.nn.functional.scaled_dot_product_attention
    seconds = graph_seconds([lambda: attention(q, k, v, is_causal=True, enable_gqa=True)] * 2)
    rate = 4.0 * 32 * 128 * 8 * 2048 * 2049 / 2 / seconds / 1e12
    print(f"torch's attention, 8 x 2048: {seconds * 1e6:.1f} us {rate:.0f} TFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=70)
    parser.add_argument("--json")
    parser.add_argument("--smoke", action="store_true", help="small shapes, correctness only")
    given = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = checks(given.smoke)
    outcomes = checked(cases, device, given.seconds * 0.6)
    bench = Bench(device, began + given.seconds)
    named = [(case.name(), outcome) for case, outcome in zip(cases, outcomes, strict=True)]
    if device.type == "cuda":
        named += list(replayed(device))
    for name, outcome in named:
        if outcome is not None:
            print(f"FAIL {name}: {outcome}")
    passed = sum(outcome is None for _, outcome in named)
    print(f"{'PASS' if passed == len(named) else 'FAIL'} {passed} of {len(named)} checks,"
          f" {time.monotonic() - began:.0f} s", flush=True)  # fmt: skip
    if device.type == "cuda" and not given.smoke:
        # A cut that did not finish in time is compiled again; one that is wrong is not timed.
        bad = [
            c.tiling for c, o in zip(cases, outcomes, strict=True) if o not in (None, "did not run")
        ]
        bench.broken = {tiling for tiling in bad if tiling}
        for step in (lambda: flash(device), lambda: measure(bench)):
            try:
                step()
            except Exception as error:
                print(f"stopped: {type(error).__name__}: {str(error)[:300]}")
        print(f"{torch.cuda.get_device_name()}, {time.monotonic() - began:.0f} s")
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"checks": named, "timings": bench.results}, file, default=str, indent=1)


if __name__ == "__main__":
    main()
