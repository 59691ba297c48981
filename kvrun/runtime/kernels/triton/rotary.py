"""Rotary positions in Triton: one launch does everything between projection and attention."""

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.triton._overlap import overlap, release, wait


def tables(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, half = len(positions), len(frequencies)
    cos, sin = torch.empty((2, tokens, half), dtype=torch.float32, device=positions.device)
    rows = 1 if tokens <= 256 else 8
    _tables[(triton.cdiv(tokens, rows),)](
        positions,
        frequencies,
        cos,
        sin,
        factor,
        tokens,
        HALF=half,
        BLOCK=triton.next_power_of_2(half),
        ROWS=rows,
        num_warps=2 if rows == 1 else 4,
        **overlap(positions.device),
    )
    return cos, sin


def rotate_append(
    qkv: torch.Tensor,
    rotation: Rotation,
    cache_rows: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_heads: int,
    head_dim: int,
) -> None:
    tokens, total = len(qkv), qkv.shape[1] // head_dim
    at_once, warps = shape(tokens, total, head_dim)
    _rotate_append[(tokens * triton.cdiv(total, at_once),)](
        qkv,
        rotation.cos,
        rotation.sin,
        cache_rows,
        slot_mapping,
        rotation.q_weight,
        rotation.k_weight,
        qkv.stride(0),
        cache_rows.stride(0),
        rotation.eps,
        QUERIES=total - 2 * kv_heads,
        KEYS=kv_heads,
        DIM=head_dim,
        HALF=rotation.half,
        INTERLEAVED=rotation.interleaved,
        NORM=rotation.q_weight is not None,
        FP8=cache_rows.dtype is not qkv.dtype,
        HEADS=at_once,
        PAIRS=triton.next_power_of_2(head_dim // 2),
        num_warps=warps,
        **overlap(qkv.device),
    )


def shape(tokens: int, heads: int, head_dim: int) -> tuple[int, int]:
    """Heads of a program, and its warps: 8 or 16 values a thread."""
    values = 1024 if tokens <= 256 else 2048
    at_once = max(1, values // triton.next_power_of_2(head_dim))
    return min(at_once, triton.next_power_of_2(heads)), 4


@triton.jit(do_not_specialize=["tokens", "factor"])
def _tables(
    positions_at,
    frequencies_at,
    cos_at,
    sin_at,
    factor,
    tokens,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < tokens)[:, None] & (columns < HALF)[None, :]
    frequencies = tl.load(frequencies_at + columns, mask=columns < HALF, other=0.0)
    wait(PDL)
    positions = tl.load(positions_at + rows, mask=rows < tokens, other=0).to(tl.float32)
    release(PDL)
    # tl.cos and tl.sin are libdevice's: exact to 2 ulp with the full reduction of large angles.
    angles = positions[:, None] * frequencies[None, :]
    places = rows[:, None].to(tl.int64) * HALF + columns[None, :]
    tl.store(cos_at + places, tl.cos(angles) * factor, mask=inside)
    tl.store(sin_at + places, tl.sin(angles) * factor, mask=inside)


@triton.jit(do_not_specialize=["eps"])
def _rotate_append(
    qkv_at,
    cos_at,
    sin_at,
    cache_at,
    slots_at,
    q_weight_at,
    k_weight_at,
    qkv_stride,
    cache_stride,
    eps,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head that are rotated
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    FP8: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    PDL: tl.constexpr,
):
    parts: tl.constexpr = (QUERIES + 2 * KEYS + HEADS - 1) // HEADS
    token = (tl.program_id(0) // parts).to(tl.int64)
    # Values are heads like the others that are neither normalised nor rotated.
    heads = (tl.program_id(0) % parts * HEADS + tl.arange(0, HEADS))[:, None]
    turned = heads < QUERIES + KEYS
    pairs = tl.arange(0, PAIRS)[None, :]
    firsts, seconds = _places(pairs, DIM, HALF, INTERLEAVED)
    is_pair = pairs < DIM // 2
    real = is_pair & (heads < QUERIES + 2 * KEYS)
    if NORM:
        weight_at = tl.where(heads < QUERIES, q_weight_at, k_weight_at)
        weight_a = tl.load(weight_at + firsts, mask=is_pair & turned, other=0.0)
        weight_b = tl.load(weight_at + seconds, mask=is_pair & turned, other=0.0)
    wait(PDL)
    slot = tl.load(slots_at + token)
    head_at = qkv_at + token * qkv_stride + heads * DIM
    a = tl.load(head_at + firsts, mask=real, other=0.0)
    b = tl.load(head_at + seconds, mask=real, other=0.0)
    if HALF > 0:
        cos = tl.load(cos_at + token * HALF + pairs, mask=pairs < HALF, other=1.0)
        sin = tl.load(sin_at + token * HALF + pairs, mask=pairs < HALF, other=0.0)
    # Not before the wait: attention reads lengths before its own, and what wrote them may overlap.
    release(PDL)
    if NORM:
        squares = tl.sum(_square(a) + _square(b), 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        a = tl.where(turned, (a.to(tl.float32) * scale * weight_a).to(a.dtype), a)
        b = tl.where(turned, (b.to(tl.float32) * scale * weight_b).to(b.dtype), b)
    if HALF > 0:
        a, b = _turn(a, b, cos, sin, turned & (pairs < HALF))
    if NORM or HALF > 0:
        tl.store(head_at + firsts, a, mask=real & turned)
        tl.store(head_at + seconds, b, mask=real & turned)
    # A row of the cache is the row of qkv behind its queries.
    store_at = cache_at + slot * cache_stride + (heads - QUERIES) * DIM
    kept = real & (heads >= tl.where(slot < 0, QUERIES + 2 * KEYS, QUERIES))
    tl.store(store_at + firsts, _stored(a, FP8), mask=kept)
    tl.store(store_at + seconds, _stored(b, FP8), mask=kept)


@triton.jit
def _places(pairs, DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The two dims of each pair. Those of a head that are not rotated follow, as pairs too."""
    if INTERLEAVED:
        firsts = pairs * 2
        seconds = firsts + 1
    elif 2 * HALF == DIM:
        firsts = pairs
        seconds = pairs + HALF
    else:
        firsts = tl.where(pairs < HALF, pairs, pairs + HALF)
        seconds = tl.where(pairs < HALF, pairs + HALF, pairs + DIM // 2)
    return firsts, seconds


@triton.jit
def _turn(a, b, cos, sin, inside):
    x = a.to(tl.float32)
    y = b.to(tl.float32)
    first = tl.where(inside, (x * cos - y * sin).to(a.dtype), a)
    return first, tl.where(inside, (y * cos + x * sin).to(b.dtype), b)


@triton.jit
def _square(x):
    return x.to(tl.float32) * x.to(tl.float32)


@triton.jit
def _stored(x, FP8: tl.constexpr):
    """Comparisons let NaN through, where a clamp might not."""
    if FP8:
        x = x.to(tl.float32)
        x = tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x)).to(tl.float8e4nv)
    return x
