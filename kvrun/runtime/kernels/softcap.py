"""Logits that are bent to lie within ±c, as Gemma 2 does."""

import torch


def softcap(x: torch.Tensor, cap: float, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """c·tanh(x / c) in fp32: x [rows, vocab] of any floating dtype, rows dense -> fp32, `out`."""
    wide = torch.empty(x.shape, device=x.device) if out is None else out
    return wide.copy_(x).div_(cap).tanh_().mul_(cap)
