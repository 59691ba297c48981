"""torchao, as transformers writes it into safetensors. Source: torchao 0.18, prototype/safetensors
and quantization/quantize_/workflows.

What a matrix holds is read from its tensors: int8 (Int8Tensor, IntxUnpackedToInt8Tensor), e4m3
(Float8Tensor), or two codes of 4 bits in a byte (Int4Tensor). Scales for activations are not
needed.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.quant import _bytes, _coded
from kvrun.runtime.quant._cut import groups_of, halves
from kvrun.runtime.quant._names import listed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.kernels.w4a16 import Coded
    from kvrun.runtime.quant import Weight

_DTYPES = {"Int4": torch.uint8, "Float8": torch.float8_e4m3fn}
_FOUR = (-8, 7)  # what fits into 4 bits


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return _coded.read(w, shards, bias, decode)


def decode(w: "Checkpoint", shard: "Shard") -> "Coded | None":
    c, name = w.config.quantization(), f"{shard.name}._weight"
    n, k = shard.out_features, shard.in_features
    kept = shard.name == "lm_head" or listed(shard.name, c.get("modules_to_not_convert"))
    if not w.has(f"{name}_qdata", otherwise=not kept):
        return None
    if w.has(f"{name}_act_pre_scale", otherwise=False):
        raise Unsupported(
            f"{shard.name} has factors for its inputs, which kvrun cannot read.",
            hint="use the model's version in 16 or 32 bits",
        )
    w.pass_over(f"{name}_act_quant_scale", f"{name}_act_quant_zero_point")
    usual = next((t for kind, t in _DTYPES.items() if kind in str(c.get("quant_type", ""))), None)
    size = (n, k // 2 if usual is torch.uint8 else k)
    shape, dtype = w.find(f"{name}_qdata", size, usual or torch.int8, any_rank=True)
    if dtype is torch.float8_e4m3fn:
        block, _ = w.find(f"{name}_scale", (n, 1), torch.float32, any_rank=True)
        parts = (n // block[0], k // block[1]) if len(block) == 2 and 0 not in block else None
        return _bytes.read(w, shard, f"{name}_qdata", f"{name}_scale", dtype, parts)
    if shape == (n, k // 2) and dtype.itemsize == 1:
        return _four(w, shard, dtype)
    if shape != (n, k) or dtype is not torch.int8:
        raise Unsupported(
            f"{shard.name} is packed for one kind of device, {list(shape)} for [{n}, {k}].",
            hint="save it with the plain packing of torchao, or use the model's version in 16 bits",
        )
    return _eight(w, shard)


def _eight(w: "Checkpoint", s: "Shard") -> "Coded":
    name, n, k = f"{s.name}._weight", s.out_features, s.in_features
    codes = w.read(f"{name}_qdata", (n, k), (s.rows, s.cols), torch.int8)
    scale = _parts(w, s, f"{name}_scale", torch.float32)
    index = groups_of(w, k, k // scale.shape[1], s.cols)
    low, high = codes.aminmax() if codes.numel() else (0, 0)
    bits = 4 if _FOUR[0] <= int(low) and int(high) <= _FOUR[1] else 8
    middle = 1 << (bits - 1)
    zero = None
    if w.has(f"{name}_zero_point", otherwise=False):
        zero = _parts(w, s, f"{name}_zero_point", torch.int8)
        zero = zero + middle if zero.is_floating_point() else zero.short() + middle
    return _coded.affine((codes + middle).view(torch.uint8), scale, zero, bits, index)


def _parts(w: "Checkpoint", s: "Shard", name: str, usual: torch.dtype) -> torch.Tensor:
    """Kept rows of a value for each group of columns, for each row, or for the matrix: [N, G]."""
    n, k = s.out_features, s.in_features
    shape, dtype = w.find(name, (n, 1), usual, any_rank=True)
    values = w.read(name, shape, None, dtype)
    if values.numel() == 1:
        values = values.reshape(1, 1).expand(n, 1)
    elif values.shape == (n,):
        values = values.view(n, 1)
    if values.ndim != 2 or len(values) != n or k % values.shape[1]:
        raise BadCheckpoint(
            f"{name} is {list(shape)}; {s.name} of [{n}, {k}] has no such parts.",
            hint="fetch the model again, or check that config.json belongs to these weights",
        )
    return values[_bytes.places(n, s.rows, w)]


def _four(w: "Checkpoint", s: "Shard", dtype: torch.dtype) -> "Coded":
    """Codes of two's complement, times a scale, plus an offset that is called zero_point."""
    name, n, k = f"{s.name}._weight", s.out_features, s.in_features
    (groups, _), kind = w.find(f"{name}_scale", (-(-k // 128), n), torch.bfloat16)
    if not groups or k % groups:
        raise BadCheckpoint(
            f"{name}_scale has {groups} groups, which do not divide {k} columns.",
            hint="fetch the model again",
        )
    codes = halves(w, f"{name}_qdata", (n, k), (s.rows, s.cols), dtype)
    scale = w.read(f"{name}_scale", (groups, n), (None, s.rows), kind).t()
    offset = w.read(f"{name}_zero_point", (groups, n), (None, s.rows), torch.float32).t()
    index = groups_of(w, k, k // groups, s.cols)
    return _coded.grouped(codes ^ 8, scale, index, zero=-offset / scale.float())
