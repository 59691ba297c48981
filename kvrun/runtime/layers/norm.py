"""RMSNorm, over a row or over each head of queries and keys."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


class RMSNorm:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension, in fp32.

    Source: Zhang & Sennrich 2019. `weight` broadcasts against x; it is [size], or [heads, size].
    """

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        # With n = |x| the divisor is sqrt(n² + size·eps) / sqrt(size): two small operators on one
        # value per row, and sqrt(size) moves into the weight. Torch's own rms_norm takes twice
        # the time on CPU.
        size = weight.shape[-1]
        self._weight = weight * size**0.5
        self._floor = torch.full((1,), (size * eps) ** 0.5, device=weight.device)

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., size] -> the same shape and dtype, written to `out` (x itself, say) if given."""
        norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        y: torch.Tensor = x / norm.hypot_(self._floor)
        if out is None:
            if x.dtype is torch.float32:
                return y.mul_(self._weight)
            out = torch.empty_like(x)
        return torch.mul(y, self._weight, out=out)


def rms_norm(w: "Checkpoint", name: str, size: int, eps: float, *, offset: float = 0.0) -> RMSNorm:
    """A norm over rows; `offset` is 1 in families that store their weight minus one."""
    return RMSNorm(w.read(f"{name}.weight", (size,), dtype=torch.float32) + offset, eps)


def head_norm(
    w: "Checkpoint", q: str, k: str, heads: int, kv_heads: int, head_dim: int, eps: float
) -> RMSNorm:
    """A norm over each head of [q; k] [tokens, heads + kv_heads, head_dim]: one weight for all
    query heads, one for all key heads."""
    weights = [w.read(f"{name}.weight", (head_dim,), dtype=torch.float32) for name in (q, k)]
    return RMSNorm(torch.cat([weights[0].expand(heads, -1), weights[1].expand(kv_heads, -1)]), eps)
