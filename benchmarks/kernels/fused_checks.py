"""Is each small kernel what its plain-torch twin is? The checks of fused.py, on its device."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from kvrun.runtime.kernels import draw, gated, noise, norm, rotary, step
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.triton import draw as t_draw
from kvrun.runtime.kernels.triton import gated as t_gated
from kvrun.runtime.kernels.triton import norm as t_norm
from kvrun.runtime.kernels.triton import rotary as t_rotary
from kvrun.runtime.kernels.triton import step as t_step

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BF16, FP16, FP32, FP8 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
# ‖out - twin‖ / ‖twin‖; Triton's interpreter cuts bfloat16 off instead of rounding.
LIMITS = {FP32: 1e-6, FP16: 4e-4, BF16: 3e-3 if DEVICE.type == "cuda" else 2e-2}
DIM = 128
INF, NAN = float("inf"), float("nan")


class Case(NamedTuple):
    kernel: str
    arguments: tuple[Any, ...]
    check: Callable[..., float]
    limit: float


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-30))


def floats(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, NAN, device=DEVICE).to(dtype)


def keyed(rows: int) -> torch.Tensor:
    made = [noise.keys(1000 + row, row % 3) for row in range(rows)]
    return torch.tensor(made, dtype=torch.int32, device=DEVICE)


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """`work` as a CUDA graph; as it is on CPU."""
    if DEVICE.type != "cuda":
        return work
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin()
        try:
            work()
        finally:
            graph.capture_end()
    return graph.replay


def check_norm(tokens: int, size: int, dtype: torch.dtype) -> float:
    x, mine = floats(tokens, size, dtype=dtype), floats(tokens, size, dtype=dtype)
    other, weight = mine.clone(), torch.rand(size, device=DEVICE) + 0.5
    out = poisoned(tokens, size, dtype=dtype)
    t_norm.rms_norm(x, weight, 1e-5, out=out)
    worst = error(out, norm.rms_norm(x, weight, 1e-5))
    out = poisoned(tokens, size, dtype=dtype)
    t_norm.add_rms_norm(x, mine, weight, 1e-5, out=out)
    worst = max(worst, error(out, norm.add_rms_norm(x, other, weight, 1e-5)), error(mine, other))
    t_norm.norm_add(x, weight, 1e-5, mine)
    worst = max(worst, error(mine, norm.norm_add(x, weight, 1e-5, other)))
    out = t_norm.norm_add_norm(x, weight, 1e-5, mine, weight, 1e-6)
    worst = max(worst, error(out, norm.norm_add_norm(x, weight, 1e-5, other, weight, 1e-6)))
    return max(worst, error(mine, other))


def check_gated(tokens: int, inner: int, dtype: torch.dtype, act: str) -> float:
    both = floats(tokens, 2 * inner, dtype=dtype, scale=3.0)
    out = poisoned(tokens, inner, dtype=dtype)
    t_gated.gated(both, act, out=out)
    return error(out, gated.gated(both, act))


def frequencies(width: int) -> torch.Tensor:
    return 1e6 ** -(torch.arange(0, width, 2, dtype=FP32, device=DEVICE) / width)


def check_tables(tokens: int) -> float:
    """The largest absolute error, against fp64 of the fp32 angle."""
    positions = torch.randint(0, 1_000_000, (tokens,), device=DEVICE)
    cos, sin = t_rotary.tables(positions, frequencies(DIM), 1.0)
    angles = (positions[:, None].float() * frequencies(DIM)).double()
    return float(max((cos - angles.cos()).abs().max(), (sin - angles.sin()).abs().max()))


def check_rotary(
    tokens: int, dtype: torch.dtype, cache: torch.dtype, normed: bool, interleaved: bool, width: int
) -> float:
    heads, kv = 6, 2
    mine = floats(tokens, (heads + 2 * kv) * DIM + 8, dtype=dtype, scale=40.0)[:, :-8]
    if cache is FP8:
        mine[0, -1], mine[0, -2], mine[0, -3] = 3e4, -500.0, float("nan")
    other = mine.clone()
    rows = [torch.zeros(2 * tokens, 2 * kv * DIM, device=DEVICE).to(cache) for _ in range(2)]
    slots = torch.randperm(2 * tokens, device=DEVICE)[:tokens]
    slots[tokens // 2] = -1
    positions = torch.randint(0, 9999, (tokens,), device=DEVICE)
    tables = rotary.tables(positions, frequencies(width), 1.0) if width else (None, None)
    rotation = Rotation(*tables, interleaved)
    if normed:
        weights = torch.rand(2, DIM, device=DEVICE) + 0.5
        rotation = rotation._replace(q_weight=weights[0], k_weight=weights[1], eps=1e-6)
    t_rotary.rotate_append(mine, rotation, rows[0], slots, kv, DIM)
    rotary.rotate_append(other, rotation, rows[1], slots, kv, DIM)
    if cache is FP8:
        nan = [r.float().isnan() for r in rows]
        assert torch.equal(*nan), "NaN differ"
        assert int(nan[0].sum()) <= 1, "more than one NaN in the cache"
        mine, other = mine.nan_to_num(), other.nan_to_num()
        rows = [r.float().nan_to_num() for r in rows]
        # A last bit that differs before the cast may cost a step of fp8: count, do not measure.
        differ = float((rows[0] != rows[1]).float().mean())
        return max(error(mine, other), differ / 10)
    return max(error(mine, other), error(*rows))


def check_draw(rows: int, vocab: int, dtype: torch.dtype, scale: float) -> float:
    """The share of ids that differ from the twin's."""
    logits = floats(rows, vocab + 8, dtype=dtype, scale=scale)[:, :vocab]
    temperature = torch.rand(rows, device=DEVICE) + 0.3
    temperature[::4] = 0
    positions = torch.randint(0, 1 << 20, (rows,), device=DEVICE)
    bad = [] if rows < 8 else [1, 4, 5]
    for row, value in zip(bad, (NAN, INF, -INF), strict=False):
        logits[row] = value
    out = torch.full((rows,), -1, device=DEVICE), torch.zeros(rows, device=DEVICE) > 0
    for _ in range(3):  # its counters must be as before after each launch
        t_draw.draw(logits, temperature, keyed(rows), positions, out=out)
    ids, _ = draw.draw(logits, temperature, keyed(rows), positions)
    good = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    good[bad] = False
    assert torch.equal(out[1], good), "finite is wrong"
    assert bool(((out[0] >= 0) & (out[0] < vocab)).all()), "ids outside the vocabulary"
    return float((out[0] != ids)[good].float().mean())


def state(slots: int, pages: int, longest: int) -> step.State:
    tables = torch.randint(1, 1 << 20, (slots, pages), dtype=torch.int32, device=DEVICE)
    tables[-1] = 0
    return step.State(
        torch.randint(0, 1 << 17, (slots,), device=DEVICE),
        torch.randint(1, longest, (slots,), dtype=torch.int32, device=DEVICE),
        tables,
        torch.rand(slots, device=DEVICE),
        keyed(slots),
    )


def empty_step(rows: int, pages: int) -> step.Step:
    def make(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, -1, dtype=dtype, device=DEVICE)

    return step.Step(
        ids=make(rows),
        positions=make(rows),
        context_lens=make(rows, dtype=torch.int32),
        slot_mapping=make(rows),
        block_tables=make(rows, pages, dtype=torch.int32),
        temperature=make(rows, dtype=FP32),
        keys=make(rows, 2, dtype=torch.int32),
    )


def copy(of: step.State) -> step.State:
    return step.State(**{f.name: getattr(of, f.name).clone() for f in fields(of)})


def differ(mine: Any, other: Any) -> int:
    """How many tensors of two states or steps are not equal."""
    return sum(not torch.equal(getattr(mine, f.name), getattr(other, f.name)) for f in fields(mine))


def check_steps(rows: int, pages: int, vocab: int) -> float:
    """Four decode steps without a model, captured once: prepare, draw, advance."""
    of, slots = state(rows + 1, pages, pages * 16 - 9), torch.randperm(rows, device=DEVICE).int()
    slots[rows - rows // 4 :] = rows
    logits, twins = floats(rows, vocab, dtype=BF16, scale=3.0), copy(of)
    into, other = empty_step(rows, pages), empty_step(rows, pages)
    out = torch.empty(rows, dtype=torch.int64, device=DEVICE), torch.zeros(rows, device=DEVICE) > 0

    def one(
        prepare: Callable[..., Any], draw: Callable[..., Any], advance: Callable[..., Any],
        at: step.State, now: step.Step,
    ) -> None:  # fmt: skip
        prepare(slots, at, now, 16)
        draw(logits, now.temperature, now.keys, now.context_lens, out=out)
        advance(slots, out[0], at)

    ours = (t_step.prepare, t_draw.draw, t_step.advance)
    one(*ours, copy(of), into)  # what is allocated or compiled once must not be captured
    again = captured(lambda: one(*ours, of, into))
    for _ in range(4):
        again()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    for _ in range(4):
        one(step.prepare, draw.draw, step.advance, twins, other)
    into.block_tables[other.block_tables == -1] = -1  # left from the first, longer or not
    return float(differ(into, other) + differ(of, twins))


def check_chain(tokens: int, size: int) -> float:
    """Kernels that overlap and feed each other: one that does not wait shows here."""
    x, mine = floats(tokens, size), floats(tokens, size)
    weight = torch.rand(size, device=DEVICE) + 0.5
    start = x.clone(), mine.clone()

    def chain() -> None:
        for _ in range(40):
            t_norm.add_rms_norm(x, mine, weight, 1e-5, out=x)
            t_norm.norm_add(mine, weight, 1e-5, x)
            z = t_norm.norm_add_norm(x, weight, 1e-5, mine, weight, 1e-5)
            t_norm.norm_add(z, weight, 1e-5, x)

    chain()
    again = captured(chain)
    x.copy_(start[0])
    mine.copy_(start[1])
    again()
    y, other = start
    for _ in range(40):
        norm.add_rms_norm(y, other, weight, 1e-5, out=y)
        norm.norm_add(other, weight, 1e-5, y)
        z = norm.norm_add_norm(y, weight, 1e-5, other, weight, 1e-5)
        norm.norm_add(z, weight, 1e-5, y)
    return max(error(x, y), error(mine, other))


def cases(smoke: bool) -> Iterator[Case]:
    norms = ((1, 256), (3, 1000)) if smoke else ((1, 256), (3, 1000), (8192, 1024), (256, 4096))
    tokens, inner = (3, 100) if smoke else (300, 14336)
    rows, vocab = (9, 2100) if smoke else (256, 128256)
    turns = ((0, 0, 128), (1, 0, 128), (1, 1, 64), (0, 0, 0), (1, 0, 48))
    for dtype in (BF16, FP16, FP32):
        limit = LIMITS[dtype]
        for shape in norms:
            yield Case("norm", (*shape, dtype), check_norm, limit)
        for act in gated.ACTIVATIONS:
            yield Case("gated", (tokens, inner, dtype, act), check_gated, limit)
        # The interpreter rounds to fp8 wrongly.
        for cache in (dtype,) if smoke else (dtype, FP8):
            for how in turns:
                yield Case("rotary", (tokens, dtype, cache, *how), check_rotary, limit)
        for scale in (3.0, 0.0):
            yield Case("draw", (rows, vocab, dtype, scale), check_draw, 0.0)
        yield Case("draw", (1, 3000 if smoke else 151936, dtype, 2.0), check_draw, 0.0)
    yield Case("tables", (4 if smoke else 4096,), check_tables, 3e-7)
    yield Case("steps", (8, 20, 300) if smoke else (256, 600, 32000), check_steps, 0.0)
    yield Case("chain", (4, 64) if smoke else (64, 1024), check_chain, 3e-5)


def run_all(smoke: bool) -> list[dict[str, Any]]:
    def run(case: Case) -> dict[str, Any]:
        name = " ".join([case.kernel, *(str(a).removeprefix("torch.") for a in case.arguments)])
        result = {"kernel": case.kernel, "case": name, "limit": case.limit, "ok": False}
        try:
            found = case.check(*case.arguments)
            return result | {"error": found, "ok": found <= case.limit}
        except Exception as e:  # one failure must not hide the others
            text = " | ".join(f"{type(e).__name__}: {e}".splitlines()[:4])[:300]
            return result | {"error": text}

    every = list(cases(smoke))
    alone = [case for case in every if case.kernel in ("steps", "chain")]  # they capture
    with ThreadPoolExecutor(8 if DEVICE.type == "cuda" else 1) as pool:
        results = list(pool.map(run, [case for case in every if case not in alone]))
    results += [run(case) for case in alone]
    failed = [r for r in results if not r["ok"]]
    kinds: dict[str, float] = {}
    for r in results:
        if r["ok"]:
            kinds[r["kernel"]] = max(kinds.get(r["kernel"], 0.0), r["error"])
    print("largest error:", *(f"{kind} {worst:.1e};" for kind, worst in kinds.items()))
    for r in failed[:15]:
        print("FAIL", r["case"], r["error"], "limit", r["limit"])
    print("FAIL:" if failed else "PASS:", len(results) - len(failed), "of", len(results), "checks")
    return results
