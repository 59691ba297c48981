"""AWQ: 4-bit codes with scales and zeros for groups of input columns. Source: AutoAWQ.

Version gemm packs along the output rows, in an order of its own; gemv along the input columns.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvrun.errors import Unsupported
from kvrun.runtime.quant import _coded
from kvrun.runtime.quant._cut import groups_of, packed
from kvrun.runtime.quant._names import listed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.kernels.w4a16 import Coded
    from kvrun.runtime.quant import Weight

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the rows in a word of version gemm
BITS = 4


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return _coded.read(w, shards, bias, decode)


def decode(w: "Checkpoint", shard: "Shard") -> "Coded | None":
    c, name = w.config.quantization(), shard.name
    kept = not listed(name, c.get("modules_to_not_convert"))
    if not w.has(f"{name}.qweight", otherwise=kept):
        return None
    if (bits := c.get("bits", c.get("w_bit", BITS))) != BITS:
        raise Unsupported(f"AWQ with {bits} bits is not supported.", hint="AWQ files have 4 bits")
    version = str(c.get("version", "gemm")).lower()
    if version not in ("gemm", "gemv"):
        raise Unsupported(f"AWQ of version '{version}' is not supported.", hint="known: gemm, gemv")
    key = "q_group_size" if c.get("group_size") is None else "group_size"
    group = shard.in_features if c.get(key) == -1 else c.integer(key, 128)
    return (_gemm if version == "gemm" else _gemv)(w, shard, group)


def _gemm(w: "Checkpoint", s: "Shard", group: int) -> "Coded":
    name, n, k = s.name, s.out_features, s.in_features
    (groups, _), dtype = w.find(f"{name}.scales", (-(-k // group), n), torch.float16)
    codes = packed(w, f"{name}.qweight", (k, n), (s.cols, s.rows), 1, BITS, ORDER)
    scale = w.read(f"{name}.scales", (groups, n), (None, s.rows), dtype)
    zero = None
    if w.has(f"{name}.qzeros", otherwise=w.config.quantization().flag("zero_point", True)):
        zero = packed(w, f"{name}.qzeros", (groups, n), (None, s.rows), 1, BITS, ORDER).t()
    index = groups_of(w, k, -(-k // groups), s.cols)
    return _coded.affine(codes.t(), scale.t(), zero, BITS, index)


def _gemv(w: "Checkpoint", s: "Shard", group: int) -> "Coded":
    name, n, k = s.name, s.out_features, s.in_features
    (_, width), dtype = w.find(f"{name}.scales", (n, -(-k // group)), torch.float16)
    codes = packed(w, f"{name}.qweight", (n, k), (s.rows, s.cols), 1, BITS)
    scale = w.read(f"{name}.scales", (n, width), (s.rows, None), dtype)
    zero = None
    if w.has(f"{name}.qzeros", otherwise=w.config.quantization().flag("zero_point", True)):
        (_, words), _ = w.find(f"{name}.qzeros", (n, -(-width // 8)), torch.int32)
        zero = packed(
            w, f"{name}.qzeros", (n, width), (s.rows, None), 1, BITS, stored=words
        )  # fmt: skip
    return _coded.affine(codes, scale, zero, BITS, groups_of(w, k, group, s.cols))
