"""Ragged: the sequences of a packed step as a few padded tensors, for layers that go through them
token by token."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch

# Sequences in one padded tensor at most, so that what a scan keeps of them stays small.
_MOST = 32


@dataclass(frozen=True)
class Part:
    """n sequences of a step, padded to `length` tokens. What is None is not needed: every sequence
    of the step is there, in order, with one token."""

    length: int
    sequences: torch.Tensor | None = None  # [n] which of the step's
    rows: torch.Tensor | None = None  # [n * length] of the step; padding repeats the first token
    lengths: torch.Tensor | None = None  # [n]; None: all have `length` tokens
    padding: torch.Tensor | None = None  # [n, length] bool
    kept: torch.Tensor | None = None  # which of the n * length are tokens
    targets: torch.Tensor | None = None  # and their rows of the step

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, ...] -> [n, ...]"""
        return x if self.sequences is None else x.index_select(0, self.sequences)

    def pad(self, x: torch.Tensor, *, zero: bool = False) -> torch.Tensor:
        """x [tokens, ...] -> [n, length, ...]; `zero`: where there is no token."""
        if self.rows is None:
            return x.unsqueeze(1)
        x = x.index_select(0, self.rows).view(-1, self.length, *x.shape[1:])
        if not zero or self.padding is None:
            return x
        return x.masked_fill(self.padding.view(*self.padding.shape, *[1] * (x.ndim - 2)), 0)

    def put(self, y: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """y [n, length, ...] to its tokens' places in `out` [tokens, ...], or as it is."""
        flat = y.flatten(0, 1)
        if self.targets is None:
            return flat
        assert out is not None
        kept = flat if self.kept is None else flat.index_select(0, self.kept)
        return out.index_copy_(0, self.targets, kept)


def parts(batch: "Batch") -> list[Part]:
    """The same for all layers of a step: sequences with one token first, then by length."""
    found: list[Part] | None = batch.shared.get(parts)
    if found is None:
        batch.shared[parts] = found = _parts(batch.query_lens_host, batch.ids.device)
    return found


def _parts(counts: list[int], device: torch.device) -> list[Part]:
    if max(counts) == 1:
        return [Part(1)]
    lengths = np.array(counts)
    starts = np.cumsum(lengths) - lengths
    order = np.argsort(lengths, kind="stable")
    ones = int((lengths == 1).sum())
    groups = [order[:ones]] if ones else []
    at = ones
    while at < len(order):
        # At most twice as long as the shortest: padding never takes more than half.
        end = at + int(np.searchsorted(lengths[order[at:]], 2 * lengths[order[at]], side="right"))
        end = min(end, at + _MOST)
        groups.append(order[at:end])
        at = end
    return [_part(group, lengths[group], starts[group], device) for group in groups]


def _part(group: np.ndarray, lengths: np.ndarray, starts: np.ndarray, device: torch.device) -> Part:
    longest = int(lengths.max())
    places = np.arange(longest)
    real = places < lengths[:, None]
    rows = starts[:, None] + np.where(real, places, 0)

    def send(column: np.ndarray) -> torch.Tensor:
        sent = torch.from_numpy(np.ascontiguousarray(column))
        if device.type == "cuda":
            # From pageable memory the copy would wait for the steps that are under way.
            sent = sent.pin_memory().to(device, non_blocking=True)
        return sent

    if real.all():
        return Part(longest, send(group), send(rows.ravel()), targets=send(rows.ravel()))
    return Part(
        longest,
        send(group),
        send(rows.ravel()),
        lengths=send(lengths),
        padding=send(~real),
        kept=send(np.flatnonzero(real)),
        targets=send(rows[real]),
    )
