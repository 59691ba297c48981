"""One token per row of logits in Triton: one launch, every logit read once.

A row is cut into chunks. Each program finds the best of its chunk, and the last one to finish a row
takes the best of those. The noise of `noise.py` costs two precise logarithms a token, more than the
reading; so a chunk is first searched with the hardware's rough ones, and precise ones are computed
only for what may still win: nearly always one token.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from kvrun.runtime.kernels.noise import MIX_A, MIX_B, POSITION_STEPS, TOKEN_STEP
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait

_A, _B, _TOKEN = tl.constexpr(MIX_A), tl.constexpr(MIX_B), tl.constexpr(TOKEN_STEP)
_FIRST, _SECOND = tl.constexpr(POSITION_STEPS[0]), tl.constexpr(POSITION_STEPS[1])
# Triton's interpreter does not know libdevice.
_LIBDEVICE = tl.constexpr(not triton.knobs.runtime.interpret)


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, vocab = logits.shape
    device = logits.device
    if out is None:
        out = (
            torch.empty(rows, dtype=torch.int64, device=device),
            torch.empty(rows, dtype=torch.bool, device=device),
        )
    chunk, warps = shape(rows, vocab)
    chunks = triton.cdiv(vocab, chunk)
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
        VOCAB=vocab,
        CHUNK=chunk,
        CHUNKS=chunks,
        CHUNKS_BLOCK=triton.next_power_of_2(chunks),
        num_warps=warps,
        **overlap(device),
    )
    return out


def shape(rows: int, vocab: int) -> tuple[int, int]:
    """Logits of a program, and its warps: as many as leave work for every multiprocessor."""
    for chunk, warps in ((8192, 16), (4096, 8), (2048, 4)):
        if rows * triton.cdiv(vocab, chunk) >= 512:
            return chunk, warps
    return 1024, 4


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
    logits_at,
    temperature_at,
    keys_at,
    positions_at,
    ids_at,
    finite_at,
    arrived_at,
    scores_at,
    places_at,
    logits_stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    at = logits_at + row.to(tl.int64) * logits_stride
    wait(PDL)
    logits = tl.load(at + ids, mask=ids < VOCAB, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_at + row)
    first = tl.load(keys_at + row * 2).to(tl.uint32, bitcast=True)
    second = tl.load(keys_at + row * 2 + 1).to(tl.uint32, bitcast=True)
    position = tl.load(positions_at + row).to(tl.uint32)
    release(PDL)
    first ^= position * _FIRST
    second ^= position * _SECOND
    # NaN counts as +inf: it wins, and is not finite.
    logits = tl.where(logits == logits, logits, float("inf"))
    broken = tl.max(logits, 0) == float("inf")
    if temperature > 0:
        best, place = _best_drawn(logits, ids, temperature, first, second)
    else:
        best = tl.max(logits, 0)
        place = tl.min(tl.where(logits == best, ids, VOCAB), 0)
    best = tl.where(broken, float("inf"), best)
    tl.store(scores_at + row * CHUNKS + chunk, best)
    tl.store(places_at + row * CHUNKS + chunk, place)
    # Releases the two stores, and acquires those of the programs that came before.
    if tl.atomic_add(arrived_at + row, 1, sem="acq_rel") == CHUNKS - 1:
        chunks = tl.arange(0, CHUNKS_BLOCK)
        of_row = row * CHUNKS + chunks
        inside = chunks < CHUNKS
        bests = tl.load(scores_at + of_row, mask=inside, other=float("-inf"), volatile=True)
        places = tl.load(places_at + of_row, mask=inside, other=VOCAB, volatile=True)
        best = tl.max(bests, 0)
        place = tl.min(tl.where(inside & (bests == best), places, VOCAB - 1), 0)
        tl.store(ids_at + row, place.to(tl.int64))
        tl.store(finite_at + row, (best > float("-inf")) & (best < float("inf")))
        tl.store(arrived_at + row, 0)


@triton.jit
def _best_drawn(logits, ids, temperature, first, second):
    """The best logit / temperature + noise of a chunk, and its lowest id."""
    bits = _bits(ids, first, second)
    rough = logits * (1.0 / temperature) + _rough_noise(bits)
    highest = tl.max(rough, 0)
    # Rough noise errs by less than 1e-4, and the quotient by 2 ulp.
    # Infinities leave no bound, so that everything or one +inf is looked at again.
    bound = highest - 2e-4 - (tl.abs(highest) + 32.0) * 1e-6
    possible = rough >= bound
    place = tl.min(tl.where(possible, ids, 0x7FFFFFFF), 0)
    last = tl.max(tl.where(possible, ids, -1), 0)
    if place == last:
        logit = tl.max(tl.where(ids == place, logits, float("-inf")), 0)
        best = tl.div_rn(logit, temperature) + _noise(_bits(place, first, second))
    else:
        scores = tl.div_rn(logits, temperature) + _noise(bits)
        best = tl.max(scores, 0)
        place = tl.min(tl.where(scores == best, ids, 0x7FFFFFFF), 0)
    return best, place


@triton.jit
def _bits(ids, first, second):
    """31 random bits of each token, as in noise.py."""
    bits = (ids.to(tl.uint32) * _TOKEN) ^ first
    bits = (bits ^ (bits >> 16)) * _A
    bits ^= second
    bits = (bits ^ (bits >> 13)) * _B
    return (bits ^ (bits >> 16)) & 0x7FFFFFFF


@triton.jit
def _noise(bits):
    """Gumbel noise, by the formula of noise.py."""
    minus_v = tl.maximum((bits.to(tl.float32) + 0.5) * -(2.0**-31), 2.0**-24 - 1)
    if _LIBDEVICE:
        return -libdevice.log(-libdevice.log1p(minus_v))
    wide = minus_v.to(tl.float64)
    rest = 1.0 + wide
    return -tl.log(-(tl.log(rest) * (wide / (rest - 1.0))).to(tl.float32))


@triton.jit
def _rough_noise(bits):
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.0**-31, 1 - 2.0**-24)
    # -log(1 - v): a series where the difference would lose v's digits.
    series = v * (1.0 + v * (0.5 + v * (1.0 / 3.0)))
    exponential = tl.where(v < 2.0**-5, series, -0.6931471805599453 * _rough_log2(1.0 - v))
    return -0.6931471805599453 * _rough_log2(exponential)


@triton.jit
def _rough_log2(x):
    if _LIBDEVICE:
        return libdevice.fast_log2f(x)
    return tl.log2(x)
