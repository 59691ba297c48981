"""One token per row of logits in Triton: one launch, every logit read once.

A row is cut into chunks, one for each program, and the last one to finish a row takes the best of
theirs. The noise of `noise.py` and a cap cost more than the reading; so a program first bounds
every score from above with rough formulas, and keeps one bound for each of its lanes. Then precise
scores are computed lane by lane, the most promising first, until no other lane can hold a better
one: nearly always after the first.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from kvrun.runtime.kernels.noise import MIX_A, MIX_B, POSITION_STEPS, TOKEN_STEP
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait
from kvrun.runtime.kernels.triton.softcap import bent

_A, _B, _TOKEN = tl.constexpr(MIX_A), tl.constexpr(MIX_B), tl.constexpr(TOKEN_STEP)
_FIRST, _SECOND = tl.constexpr(POSITION_STEPS[0]), tl.constexpr(POSITION_STEPS[1])
_LOG2E, _LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
# So many lanes are looked at one by one; where more are alike, all at once is faster.
_MOST = tl.constexpr(8)
_INF = tl.constexpr(float("inf"))
_NAN = tl.constexpr(tl.PropagateNan.ALL)
# Triton's interpreter knows neither libdevice nor PTX.
_COMPILED = tl.constexpr(not triton.knobs.runtime.interpret)


class Shape(NamedTuple):
    """How a row is cut: a program takes `steps` stretches of `lanes` logits, `unroll` at once."""

    lanes: int
    steps: int
    unroll: int
    warps: int


# Lanes of 8 logits a thread and step are read by 16 bytes. The largest first.
SHAPES = (
    Shape(1024, 16, 4, 4),
    Shape(1024, 8, 2, 4),
    Shape(1024, 4, 2, 4),
    Shape(1024, 2, 2, 4),
    Shape(1024, 1, 1, 4),
)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    cap: float | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocab = logits.shape
    device = logits.device
    if out is None:
        out = (
            torch.empty(rows, dtype=torch.int64, device=device),
            torch.empty(rows, dtype=torch.bool, device=device),
        )
    lanes, steps, unroll, warps = shape(rows, vocab)
    chunks = triton.cdiv(vocab, lanes * steps)
    arrived, scores, places = _between(triton.next_power_of_2(rows * chunks), device)
    _draw[(rows * chunks,)](
        logits,
        temperature,
        keys,
        positions,
        out[0],
        out[1],
        arrived,
        scores,
        places,
        logits.stride(0),
        cap,
        VOCAB=vocab,
        LANES=lanes,
        STEPS=steps,
        UNROLL=unroll,
        CHUNKS=chunks,
        CHUNKS_BLOCK=triton.next_power_of_2(chunks),
        num_warps=warps,
        **overlap(device),
    )
    return out


def shape(rows: int, vocab: int) -> Shape:
    """The largest that leaves work for every multiprocessor, as it was fastest on an H100."""
    for found in SHAPES:
        if rows * triton.cdiv(vocab, found.lanes * found.steps) >= 128:
            return found
    return SHAPES[-1]


@cache
def _between(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the programs of a row tell each other: how many are done, and the best of each.

    Kept, because captured graphs name it, and zero between launches: so draws on one device must
    follow each other on one stream.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("draw has to run once with this many rows before it is captured")
    arrived = torch.zeros(size, dtype=torch.int32, device=device)
    return arrived, torch.empty(size, device=device), torch.empty_like(arrived)


@triton.jit
def _draw(
    logits_at, temperature_at, keys_at, positions_at, ids_at, finite_at,
    arrived_at, scores_at, places_at, logits_stride, cap,
    VOCAB: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr,
    CHUNKS: tl.constexpr, CHUNKS_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    at = logits_at + row.to(tl.int64) * logits_stride
    wait(PDL)
    temperature = tl.load(temperature_at + row)
    first = tl.load(keys_at + row * 2).to(tl.uint32, bitcast=True)
    second = tl.load(keys_at + row * 2 + 1).to(tl.uint32, bitcast=True)
    position = tl.load(positions_at + row).to(tl.uint32)
    first ^= position * _FIRST
    second ^= position * _SECOND
    # Their share in the shifts of every token's bits is the same.
    first ^= first >> 16
    second ^= second >> 13
    if temperature > 0:
        bounds = _drawn(at, chunk, temperature, first, second, cap, VOCAB, LANES, STEPS, UNROLL)
    else:
        bounds = _greedy(at, chunk, cap, VOCAB, LANES, STEPS, UNROLL)
    release(PDL)
    best, place = _search(
        bounds, at, chunk * STEPS * LANES, temperature, first, second, cap, VOCAB, LANES, STEPS
    )
    tl.store(scores_at + row * CHUNKS + chunk, best)
    tl.store(places_at + row * CHUNKS + chunk, place)
    # Releases the two stores, and acquires those of the programs that came before.
    if tl.atomic_add(arrived_at + row, 1, sem="acq_rel") == CHUNKS - 1:
        chunks = tl.arange(0, CHUNKS_BLOCK)
        of_row = row * CHUNKS + chunks
        inside = chunks < CHUNKS
        bests = tl.load(scores_at + of_row, mask=inside, other=-_INF, volatile=True)
        places = tl.load(places_at + of_row, mask=inside, other=VOCAB, volatile=True)
        best = tl.max(bests, 0)
        place = tl.min(tl.where(inside & (bests == best), places, VOCAB - 1), 0)
        tl.store(ids_at + row, place.to(tl.int64))
        tl.store(finite_at + row, (best > -_INF) & (best < _INF))
        tl.store(arrived_at + row, 0)


@triton.jit
def _drawn(
    at, chunk, temperature, first, second, cap,
    VOCAB: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """No score of a lane lies above its bound; NaN is +inf."""
    scale = _LOG2E / temperature
    bend = 0.0
    if cap is not None:
        bend = 2 * _LOG2E / cap
        scale = scale * (-2.0 * cap)
    lanes = tl.arange(0, LANES)
    start = chunk * STEPS
    tokens = (start * LANES + lanes).to(tl.uint32) * _TOKEN
    bounds = tl.full((LANES,), -_INF, tl.float32)
    whole = tl.minimum(start + STEPS, VOCAB // LANES)
    for step in tl.range(start, whole, loop_unroll_factor=UNROLL):
        x = tl.load(at + step * LANES + lanes).to(tl.float32)
        rough = _rough(x, _bits(tokens, first, second), scale, bend, cap)
        bounds = tl.maximum(bounds, rough, propagate_nan=_NAN)
        tokens += LANES * _TOKEN % 2**32
    if start + STEPS > whole:
        ids = whole * LANES + lanes
        x = tl.load(at + ids, mask=ids < VOCAB, other=0.0).to(tl.float32)
        bits = _bits(ids.to(tl.uint32) * _TOKEN, first, second)  # tokens would cost registers
        rough = _rough(x, bits, scale, bend, cap)
        rough = tl.where(ids < VOCAB, rough, -_INF)
        bounds = tl.maximum(bounds, rough, propagate_nan=_NAN)
    bounds = (bounds + 31.0) * _LN2
    # Rough formulas and rounding lose less than 2e-6 of the largest number on the way.
    lost = 32.0
    if cap is not None:
        bounds += cap / temperature
        lost += 2.0 * cap / temperature
    bounds = tl.maximum(bounds * (1 - 2e-6), bounds * (1 + 2e-6)) + lost * 2e-6
    return tl.where(bounds == bounds, bounds, _INF)


@triton.jit
def _greedy(
    at, chunk, cap,
    VOCAB: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """As `_drawn`, of the logits themselves."""
    start = chunk * STEPS
    bounds = tl.full((LANES,), -_INF, tl.float32)
    whole = tl.minimum(start + STEPS, VOCAB // LANES)
    for step in tl.range(start, whole, loop_unroll_factor=UNROLL):
        x = tl.load(at + step * LANES + tl.arange(0, LANES)).to(tl.float32)
        bounds = tl.maximum(bounds, x, propagate_nan=_NAN)
    if start + STEPS > whole:
        ids = whole * LANES + tl.arange(0, LANES)
        x = tl.load(at + ids, mask=ids < VOCAB, other=-_INF).to(tl.float32)
        bounds = tl.maximum(bounds, x, propagate_nan=_NAN)
    if cap is not None:
        bounds = bent(bounds, cap) + 2e-6 * cap  # it keeps the order but for the last bits
    return tl.where(bounds == bounds, bounds, _INF)


@triton.jit
def _search(
    bounds, at, start, temperature, first, second, cap,
    VOCAB: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The best score of a chunk and its lowest id; +inf and any id where there is NaN or +inf."""
    best, place = -_INF, start
    lanes = tl.arange(0, LANES)
    bound, lane = tl.max(bounds, 0, return_indices=True)
    left = _MOST
    while (bound > -_INF) & (bound >= best) & (best < _INF) & (left > 0):
        ids = start + lane + tl.arange(0, STEPS) * LANES
        x = tl.load(at + ids, mask=ids < VOCAB, other=0.0).to(tl.float32)
        scores = _scores(x, ids, temperature, first, second, cap)
        scores = tl.where(ids < VOCAB, scores, -_INF)
        highest = tl.max(scores, 0)
        lowest = tl.min(tl.where(scores == highest, ids, VOCAB), 0)
        better = (highest > best) | ((highest == best) & (lowest < place))
        best = tl.where(better, highest, best)
        place = tl.where(better, lowest, place)
        bounds = tl.where(lanes == lane, -_INF, bounds)
        bound, lane = tl.max(bounds, 0, return_indices=True)
        left -= 1
    if (left == 0) & (bound > -_INF) & (bound >= best) & (best < _INF):
        bests = tl.full((LANES,), -_INF, tl.float32)
        places = start + lanes
        for step in range(STEPS):
            ids = start + step * LANES + lanes
            x = tl.load(at + ids, mask=ids < VOCAB, other=0.0).to(tl.float32)
            scores = _scores(x, ids, temperature, first, second, cap)
            better = (scores > bests) & (ids < VOCAB)
            bests = tl.where(better, scores, bests)
            places = tl.where(better, ids, places)
        best = tl.max(bests, 0)
        place = tl.min(tl.where(bests == best, places, VOCAB), 0)
    return best, place


@triton.jit
def _scores(x, ids, temperature, first, second, cap):
    """Logit / temperature + noise, or the logit; NaN counts as +inf."""
    if cap is not None:
        x = bent(x, cap)
    if temperature > 0:
        x = tl.div_rn(x, temperature) + _noise(_bits(ids.to(tl.uint32) * _TOKEN, first, second))
    return tl.where(x == x, x, _INF)


@triton.jit
def _rough(x, bits, scale, bend, cap):
    """Scores times log2(e), without what is the same for all; not below the precise ones.

    c·tanh(x / c) is c - 2c / (1 + e^(2x / c)). Of noise's -log(1 - v) three terms of the series are
    kept: none is negative, and for the small v of large noise they are precise. Here v times 2^31.
    """
    v = bits.to(tl.float32)
    exponential = v * (1.0 + v * (0.5 * 2.0**-31 + v * (2.0**-62 / 3.0)))
    if cap is not None:
        x = _rough_reciprocal(1.0 + _rough_exp2(x * bend))
    return x * scale - _rough_log2(exponential)


@triton.jit
def _bits(tokens, first, second):
    """31 random bits of each token, as in noise.py; tokens: ids times TOKEN_STEP."""
    bits = _xor(tokens, tokens >> 16, first) * _A
    bits = _xor(bits, bits >> 13, second) * _B
    return (bits ^ (bits >> 16)) & 0x7FFFFFFF


@triton.jit
def _noise(bits):
    """Gumbel noise, by the formula of noise.py."""
    minus_v = tl.maximum((bits.to(tl.float32) + 0.5) * -(2.0**-31), 2.0**-24 - 1)
    if _COMPILED:
        return -libdevice.log(-libdevice.log1p(minus_v))
    wide = minus_v.to(tl.float64)
    rest = 1.0 + wide
    return -tl.log(-(tl.log(rest) * (wide / (rest - 1.0))).to(tl.float32))


@triton.jit
def _xor(x, y, z):
    if _COMPILED:  # one instruction, where LLVM would move the key back before the shift
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0x96;", "=r,r,r,r", [x, y, z], tl.uint32, is_pure=True, pack=1
        )
    return x ^ y ^ z


@triton.jit
def _rough_log2(x):
    if _COMPILED:
        return _fast("lg2.approx.ftz.f32 $0, $1;", x)
    return tl.log2(x)


@triton.jit
def _rough_exp2(x):
    if _COMPILED:
        return _fast("ex2.approx.ftz.f32 $0, $1;", x)
    return tl.exp2(x)


@triton.jit
def _rough_reciprocal(x):
    if _COMPILED:
        return _fast("rcp.approx.ftz.f32 $0, $1;", x)
    return 1.0 / x


@triton.jit
def _fast(PTX: tl.constexpr, x):
    """One instruction: what Triton makes of these also cares for denormal numbers."""
    return tl.inline_asm_elementwise(PTX, "=f,f", [x], tl.float32, is_pure=True, pack=1)
