"""Rows in 8 bits: the twin of `triton/fp8.py`, in plain torch."""

import torch

from kvrun.runtime.kernels.gated import gated
from kvrun.runtime.kernels.norm import rms_norm

LARGEST = 448.0  # of e4m3
LEAST = 1e-12  # a scale, so that rows of zeros stay zeros


def quantise_rows(
    x: torch.Tensor,
    *,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> e4m3 [M, K] and fp32 scales [M, 1], whose product is x but for rounding.

    The largest value of a row becomes the largest of e4m3. Rows may be apart. `norm`: the weight
    [K] fp32 of an RMSNorm that is applied to x first; `act`: x is [M, 2 * K], gates and ups, and
    act(gate) · up is what becomes e4m3. Both round to x's dtype in between.
    """
    if act is not None:
        x = gated(x, act)
    if norm is not None:
        x = rms_norm(x, norm, eps)
    wide = x.float()
    scale = (wide.abs().amax(1, keepdim=True) / LARGEST).clamp_(min=LEAST)
    return (wide / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale
