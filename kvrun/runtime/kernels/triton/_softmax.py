"""What both attention kernels do with a tile of keys: find it, score it, take its values in.

Logits are kept in base 2, times a `UNIT` that is applied as late as possible: without soft cap and
slopes the products stay as they are and the scale is part of UNIT.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Where a running maximum starts: below any logit, and finite, so that a row which has seen no key
# yet computes exp2(-inf - LOWEST) = 0 and not NaN.
LOWEST = tl.constexpr(-1.0e30)
# The interpreter multiplies the bits of bfloat16 as if they were integers.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def product(a, b, plus):
    """a @ b + plus, summed in float32; float32 operands are not shortened."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, plus, input_precision="ieee")


@triton.jit
def pages_of(table_at, tokens, end, BLOCK_SIZE: tl.constexpr):
    """The page of each token of one sequence; tokens from `end` on have none and get page 0."""
    return tl.load(table_at + tokens // BLOCK_SIZE, mask=tokens < end, other=0)


@triton.jit
def rows_of(rows_at, rows, stride, seen, DIM: tl.constexpr, PADDED: tl.constexpr):
    """[len(rows), PADDED] values; zeros where `seen` is false and from column DIM on."""
    columns = tl.arange(0, PADDED)
    places = rows_at + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    mask = None
    if seen is not None:
        mask = seen[:, None]
    if DIM < PADDED:
        mask = (columns < DIM)[None, :] if mask is None else mask & (columns < DIM)[None, :]
    return tl.load(places) if mask is None else tl.load(places, mask=mask, other=0.0)


@triton.jit
def slopes_of(alibi_at, heads, real):
    """What a score loses per token of distance, by head; None where it does not."""
    slopes = None
    if alibi_at is not None:
        slopes = tl.load(alibi_at + heads, mask=real, other=0.0)
    return slopes


@triton.jit
def bent(products, slopes, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Products as logits of the query's own position, where slopes add nothing, but for UNIT."""
    scores = products
    if SOFTCAP is not None or slopes is not None:
        scores = products * SCALE
    if SOFTCAP is not None:
        small = tl.exp2(tl.abs(scores) * (-2 * LOG2E / SOFTCAP))
        bent = (1 - small) / (1 + small) * SOFTCAP
        scores = tl.where(scores < 0, -bent, bent)
    return scores


@triton.jit
def logits(products, keys, queries, slopes, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Products [queries, keys] as logits, but for the factor UNIT; positions keys, queries."""
    scores = bent(products, slopes, SCALE, SOFTCAP)
    if slopes is not None:
        scores += slopes[:, None] * (keys[None, :] - queries[:, None]).to(tl.float32)
    return scores


@triton.jit
def absorb(scores, values, top, total, out, UNIT: tl.constexpr):
    """One more tile in the running softmax: its maximum, its sum, and the weighted values."""
    now = tl.maximum(top, tl.max(scores, 1) * UNIT)
    weights = tl.exp2(scores * UNIT - now[:, None])
    fade = tl.exp2(top - now)
    total = total * fade + tl.sum(weights, 1)
    out = product(weights.to(values.dtype), values, out * fade[:, None])
    return now, total, out


@triton.jit
def begin(sinks_at, heads, real, first):
    """Running maximum and sum before any key; a sink is a logit that the first part has seen."""
    top = tl.full(heads.shape, LOWEST, tl.float32)
    total = tl.zeros(heads.shape, tl.float32)
    if sinks_at is not None:
        sinks = tl.load(sinks_at + heads, mask=real, other=0.0) * LOG2E
        top = tl.where(first, sinks, top)
        total = tl.where(first, 1.0, total)
    return top, total
