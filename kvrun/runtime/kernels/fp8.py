"""Rows in 8 bits: the twin of `triton/fp8.py`, in plain torch."""

import torch

LARGEST = 448.0  # of e4m3
LEAST = 1e-12  # a scale, so that rows of zeros stay zeros


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> e4m3 [M, K] and fp32 scales [M, 1], whose product is x but for rounding.

    The largest value of a row becomes the largest of e4m3. Rows may be apart.
    """
    wide = x.float()
    scale = (wide.abs().amax(1, keepdim=True) / LARGEST).clamp_(min=LEAST)
    return (wide / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale
