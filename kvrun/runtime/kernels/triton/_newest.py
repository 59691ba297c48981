"""A sequence's newest token inside of attention: its queries and key are normalised, rotated and
stored by the kernel that reads them, as `rotary.py` does for any token."""

import triton
import triton.language as tl

from kvrun.runtime.kernels.triton._softmax import LOWEST, bent
from kvrun.runtime.kernels.triton.rotary import _stored


@triton.jit
def norms_of(
    q_norm_at, k_norm_at,
    DIM: tl.constexpr, PADDED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Weights of queries and of keys, for each column and for its partner; 1.0 without norms."""
    q, q_partner, k, k_partner = 1.0, 1.0, 1.0, 1.0
    if q_norm_at is not None:
        columns = tl.arange(0, PADDED)
        partners = _partners(columns, HALF, INTERLEAVED)
        q = tl.load(q_norm_at + columns, mask=columns < DIM, other=0.0)
        q_partner = tl.load(q_norm_at + partners, mask=columns < DIM, other=0.0)
        k = tl.load(k_norm_at + columns, mask=columns < DIM, other=0.0)
        k_partner = tl.load(k_norm_at + partners, mask=columns < DIM, other=0.0)
    return q, q_partner, k, k_partner


@triton.jit
def take_in(
    queries_at, key_at, head, cos_at, sin_at, angles, norms, eps, cache_at, slot, last,
    top, total, slopes,
    SCALE: tl.constexpr, UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_HEADS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    PADDED: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The rotated queries [ROWS, PADDED] of a kv head, and a softmax that has seen their own key.

    Heads are `head` apart in memory, a value KV_HEADS heads behind its key. The program that has
    the `last` part stores both and takes them in, the others have q only; a negative slot is none.
    """
    group, columns = tl.arange(0, ROWS), tl.arange(0, PADDED)
    partners = _partners(columns, HALF, INTERLEAVED)
    turns = columns < 2 * HALF
    inside = (group < SHARE)[:, None] & (columns < DIM)[None, :]
    there = columns < tl.where(last, DIM, 0)
    # All loads before the first sum, which waits for its own, and what is behind it for that.
    queries_at += group[:, None] * head
    q = tl.load(queries_at + columns[None, :], mask=inside, other=0.0)
    q_partner = tl.load(queries_at + partners[None, :], mask=inside, other=0.0)
    key = tl.load(key_at + columns, mask=there, other=0.0)
    key_partner = tl.load(key_at + partners, mask=there, other=0.0)
    value = tl.load(key_at + KV_HEADS * head + columns, mask=there, other=0.0)
    if INTERLEAVED:
        pairs, firsts = columns // 2, columns % 2 == 0
    else:
        pairs, firsts = columns % HALF, columns < HALF
    cos = tl.load(cos_at + angles + pairs, mask=turns, other=1.0)
    sin = tl.load(sin_at + angles + pairs, mask=turns, other=0.0)
    sin = tl.where(firsts, -sin, sin)
    if NORM:
        mine, other, key_mine, key_other = norms
        q, q_partner = _normal(q, q_partner, mine[None, :], other[None, :], eps, 1, DIM)
        key, key_partner = _normal(key, key_partner, key_mine, key_other, eps, 0, DIM)
    q = _turn(q, q_partner, cos[None, :], sin[None, :], turns[None, :])
    FP8: tl.constexpr = cache_at.dtype.element_ty != key_at.dtype.element_ty
    key = _stored(_turn(key, key_partner, cos, sin, turns), FP8)
    value = _stored(value, FP8)
    row_at = cache_at + slot * (2 * KV_HEADS * DIM) + columns
    kept = columns < tl.where(last & (slot >= 0), DIM, 0)
    tl.store(row_at, key, mask=kept)
    tl.store(row_at + KV_HEADS * DIM, value, mask=kept)
    scores = tl.sum(q.to(tl.float32) * key.to(tl.float32)[None, :], 1)
    scores = tl.where(last, bent(scores, slopes, SCALE, SOFTCAP) * UNIT, LOWEST)
    now = tl.maximum(top, scores)
    weights = tl.where(last, tl.exp2(scores - now), 0.0)
    total = total * tl.exp2(top - now) + weights
    return q, now, total, weights[:, None] * value.to(tl.float32)[None, :]


@triton.jit
def _partners(columns, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The other column of each one's pair; one that does not turn is its own."""
    if INTERLEAVED:
        partners = columns ^ 1
    else:
        partners = tl.where(columns < HALF, columns + HALF, columns - HALF)
    return tl.where(columns < 2 * HALF, partners, columns)


@triton.jit
def _normal(x, partner, weight, weight_partner, eps, AXIS: tl.constexpr, DIM: tl.constexpr):
    """Heads along AXIS and their partners, normalised and rounded."""
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, AXIS, keep_dims=True) / DIM + eps)
    partner = (partner.to(tl.float32) * scale * weight_partner).to(x.dtype)
    return (wide * scale * weight).to(x.dtype), partner


@triton.jit
def _turn(x, partner, cos, sin, turns):
    """Heads, rotated and rounded."""
    both = x.to(tl.float32) * cos + partner.to(tl.float32) * sin
    return tl.where(turns, both.to(x.dtype), x)
