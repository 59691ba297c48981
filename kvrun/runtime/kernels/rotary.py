"""Rotary positions: tables of angles once a step; norm, rotation and K/V store once a layer."""

from typing import NamedTuple

import torch

from kvrun.runtime.kernels.norm import rms_norm

# The largest value of float8_e4m3fn.
FP8_MAX = 448.0


class Rotation(NamedTuple):
    """What becomes of queries and keys between their product and attention.

    With q_weight and k_weight [head_dim] fp32, every query and key head is normalised first and
    rounded to its dtype. Then its first dims are turned by cos and sin [tokens, half] fp32: as
    pairs (i, i + half) or, `interleaved`, (2i, 2i + 1); nothing is turned where they are None.
    """

    cos: torch.Tensor | None = None
    sin: torch.Tensor | None = None
    interleaved: bool = False
    q_weight: torch.Tensor | None = None
    k_weight: torch.Tensor | None = None
    eps: float = 0.0

    @property
    def half(self) -> int:
        """Pairs of a head that are turned."""
        return 0 if self.cos is None else self.cos.shape[1]


def tables(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of position · frequency, times `factor`: [tokens, width / 2] fp32 each.

    positions: [tokens] integers; frequencies: [width / 2] fp32, angles per position. The product
    is rounded to fp32 as in Hugging Face's models.
    """
    angles = positions[:, None].float() * frequencies
    return angles.cos() * factor, angles.sin() * factor


def rotate_append(
    qkv: torch.Tensor,
    rotation: Rotation,
    cache_rows: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_heads: int,
    head_dim: int,
) -> None:
    """Norm and rotate queries and keys in place, and store keys and values in the cache.

    qkv: [tokens, (heads + 2 * kv_heads) * head_dim], each row dense. cache_rows: [slots,
    2 * kv_heads * head_dim], of qkv's dtype or float8_e4m3fn (saturating). slot_mapping: [tokens]
    int64; a negative slot stores nothing.
    """
    x = qkv.view(len(qkv), -1, head_dim)
    heads = x.shape[1] - 2 * kv_heads
    cos, sin, q_weight, k_weight = rotation.cos, rotation.sin, rotation.q_weight, rotation.k_weight
    if q_weight is not None and k_weight is not None:
        for part, weight in ((x[:, :heads], q_weight), (x[:, heads : heads + kv_heads], k_weight)):
            rms_norm(part, weight, rotation.eps, out=part)
    if cos is not None and sin is not None:
        width = 2 * rotation.half
        turned = x[:, : heads + kv_heads, :width]
        step = 2 if rotation.interleaved else 1
        half = 1 if rotation.interleaved else width // 2
        first, second = turned[..., : width - half : step], turned[..., half::step]
        a, b = first.float(), second.float()
        cos, sin = cos[:, None], sin[:, None]
        both = a * cos - b * sin, b * cos + a * sin  # before the writes: a and b may be views
        first.copy_(both[0])
        second.copy_(both[1])
    kv = x[:, heads:].flatten(1)
    if cache_rows.dtype is not kv.dtype:
        kv = kv.float().clamp(-FP8_MAX, FP8_MAX).to(cache_rows.dtype)
    stored = slot_mapping >= 0
    cache_rows[slot_mapping[stored]] = kv[stored]
