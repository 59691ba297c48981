"""HQQ: codes of 1 to 8 bits with float zeros. Source: hqq 0.2.8, core/quantize.py, core/bitpack.py.

Groups run over the flattened matrix, a row of codes (axis 1) or a column (axis 0) each; a byte, or
a word of 3-bit codes, holds codes from equal parts of the rows, the first part in its highest bits.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.quant import _coded
from kvrun.runtime.quant._bytes import places
from kvrun.runtime.quant._names import listed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.quant import Weight

# What lies beside the codes of a matrix and is known from them.
_SAID = ("nbits", "group_size", "axis", "shape", "packing", "view_as_float", "unpack_view_dtype",
         "compute_dtype", "quant_zero", "quant_scale", "channel_wise", "optimize", "round_zero",
         "offload_meta", "encoded_state_dict", "stores_quant_config")  # fmt: skip
_THREE = 10  # codes of 3 bits in a word
_GROUP = 64


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return _coded.read(w, shards, bias, decode)


def decode(w: "Checkpoint", shard: "Shard") -> _coded.Found:
    c, name = w.config.quantization(), shard.name
    n, k = shard.out_features, shard.in_features
    kept = name == "lm_head" or listed(name, c.get("skip_modules"))
    if not w.has(f"{name}.W_q", otherwise=not kept):
        return None
    if any(
        w.has(f"{name}.{part}", otherwise=False) for part in ("scale_q", "zero_q", "zero_scale")
    ):
        raise Unsupported(
            f"the scales of {name} are quantized themselves, which kvrun cannot read.",
            hint="use the model's version in 16 or 32 bits",
        )
    w.pass_over(*(f"{name}.{part}" for part in _SAID))
    scale, zero = (_values(w, shard, part) for part in ("scale", "zero"))
    if zero.shape != scale.shape or not scale.numel() or n * k % scale.numel():
        raise _wrong(f"{name}.scale and zero are {list(scale.shape)} and {list(zero.shape)}", shard)
    rows_first = scale.shape[1] == 1
    size = n * k // scale.numel()
    height = scale.numel() if rows_first else size
    codes, bits = _codes(w, shard, height)
    rows, cols = places(n, shard.rows, w), places(k, shard.cols, w)
    if rows_first and k % size == 0:
        scale, zero = scale.view(n, -1)[rows], zero.view(n, -1)[rows]
        return _coded.affine(codes.view(n, k)[rows][:, cols], scale, zero, bits, cols // size)
    # Columns of a group are not neighbours: no group of columns has a scale of its own.
    values = codes.view(height, -1).float().sub_(zero).mul_(scale.float())
    return values.view(n, k)[rows][:, cols].to(w.dtype)


def _values(w: "Checkpoint", s: "Shard", part: str) -> torch.Tensor:
    """Scales as stored, zeros in fp32, [G, 1] or [1, G]."""
    name, count = f"{s.name}.{part}", max(1, s.out_features * s.in_features // _GROUP)
    shape, dtype = w.find(name, (count, 1), torch.float16)
    if 1 not in shape:
        raise _wrong(f"{name} is {list(shape)}", s)
    return w.read(name, shape, None, dtype if part == "scale" else torch.float32)


def _codes(w: "Checkpoint", s: "Shard", height: int) -> tuple[torch.Tensor, int]:
    """uint8 of as many values as the matrix has, in `height` rows; how many bits they need."""
    name, total = f"{s.name}.W_q", s.out_features * s.in_features
    width = total // height
    shape, dtype = w.find(name, (height // 2, width), torch.uint8, any_rank=True)
    stored = w.read(name, shape, None, dtype)
    if dtype not in (torch.uint8, torch.int32):  # viewed as floats for those who shard it
        three = stored.nbytes == -(-height // _THREE) * width * 4
        stored = stored.view(torch.int32 if three else torch.uint8)
    if stored.dtype is torch.int32:
        if stored.numel() != -(-height // _THREE) * width:
            raise _wrong(f"{name} is {list(shape)}", s)
        shifts, bits = range(27, -1, -3), 3
    else:
        per = total // max(stored.numel(), 1)
        if per not in (1, 2, 4, 8) or per * stored.numel() != total or height % per:
            raise _wrong(f"{name} is {list(shape)}", s)
        bits = 8 // per
        shifts = range(8 - bits, -1, -bits)
    stored, mask = stored.reshape(-1, width), (1 << bits) - 1
    parts = [(stored >> shift & mask).to(torch.uint8) for shift in shifts]
    return torch.cat(parts)[:height], bits


def _wrong(what: str, s: "Shard") -> BadCheckpoint:
    return BadCheckpoint(
        f"{what}; {s.name} of [{s.out_features}, {s.in_features}] has no such parts.",
        hint="fetch the model again, or check that config.json belongs to these weights",
    )
