"""mxfp4: gpt-oss's experts, e2m1 with a power of two for 32 columns. Source: transformers,
integrations/mxfp4.py.

Every expert's matrix is [out, in], whatever the plain version of the model has. Everything else is
plain.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvrun.errors import BadCheckpoint
from kvrun.runtime.quant import _coded, dense
from kvrun.runtime.quant._cut import trim
from kvrun.runtime.quant._tables import E2M1

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.kernels.w4a16 import Coded
    from kvrun.runtime.quant import Weight

SIZE = 32  # columns that share a scale
_MIDDLE = 127  # a scale's exponent 0


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return dense.read(w, shards, bias)


def decode(w: "Checkpoint", shard: "Shard") -> None:
    """A matrix that is not one of a stack is plain."""


def expert(w: "Checkpoint", s: "Shard", count: int, n: int) -> "Coded":
    """The kept part of expert `n` of `count`."""
    rows, k = s.out_features, s.in_features
    if k % SIZE:
        raise BadCheckpoint(
            f"{s.name} has {k} columns, which blocks of {SIZE} do not divide.",
            hint="check that config.json belongs to these weights",
        )
    groups, own = k // SIZE, ((n, n + 1),)
    covering = None if s.cols is None else tuple((a // SIZE, -(-b // SIZE)) for a, b in s.cols)
    cut = (own, s.rows, covering)
    blocks = w.read(
        f"{s.name}_blocks", (count, rows, groups, SIZE // 2), (*cut, None), torch.uint8
    )[0]
    scale = w.read(f"{s.name}_scales", (count, rows, groups), cut, torch.uint8)[0]
    # Halves of a byte, the lower one first.
    codes = torch.stack((blocks & 15, blocks >> 4), 3).flatten(1)
    index = torch.arange(codes.shape[1], device=w.device) // SIZE
    if s.cols is not None:
        codes, index = trim(codes, s.cols, SIZE), trim(index.view(1, -1), s.cols, SIZE)[0]
    # 16 bits hold a power of two exactly.
    power = torch.exp2(scale.float() - _MIDDLE).bfloat16()
    return _coded.grouped(codes, power, index, table=torch.tensor(E2M1, device=w.device))
