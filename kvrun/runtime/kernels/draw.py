"""One token per row of logits: the likeliest, or a draw at a temperature."""

from functools import cache

import torch

from kvrun.runtime.kernels.noise import Gumbel
from kvrun.runtime.kernels.softcap import softcap


def draw(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
    *,
    cap: float | None = None,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [S] int64 and finite [S] bool, written to `out` if given.

    logits: [S, vocab] fp32, bf16 or fp16, each row dense.
    temperature: [S] fp32. A row's id is the argmax of logits / temperature + noise, of its logits
    where the temperature is 0; of equals the lowest. With a `cap` c the logits count as fp32
    c·tanh(y / c). keys: [S, 2] int32 of `noise.keys`;
    positions: [S] integers, the index of the drawn token in its sequence. finite is false for a
    row that has NaN or +inf, or nothing but -inf: its id is one of the vocabulary, no more.
    """
    logits = logits.float() if cap is None else softcap(logits, cap)
    column = temperature[:, None]
    noise = _gumbel(logits.shape[1], logits.device)(keys, positions)
    scores = torch.where(column > 0, logits / column + noise, logits)
    best, ids = scores.max(-1)
    largest = logits.amax(-1)
    found = ids, best.isfinite() & largest.isfinite()
    if out is None:
        return found
    return out[0].copy_(found[0]), out[1].copy_(found[1])


@cache
def _gumbel(vocab_size: int, device: torch.device) -> Gumbel:
    return Gumbel(vocab_size, device)
