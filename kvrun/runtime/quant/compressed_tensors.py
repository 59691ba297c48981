"""compressed-tensors: packed integers, plain integers, or e4m3. Source: compressed-tensors 0.20.

What a matrix holds is read from the shapes of its tensors: groups of modules may differ.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvrun.errors import Unsupported
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.quant import _bytes, _coded
from kvrun.runtime.quant._cut import bits_of, groups_of, halves, packed
from kvrun.runtime.quant._names import listed
from kvrun.runtime.quant._tables import E2M1

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.kernels.w4a16 import Coded
    from kvrun.runtime.quant import Weight

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized",
           "mxfp4-pack-quantized", "nvfp4-pack-quantized", "mixed-precision", "dense")  # fmt: skip
BITS = (2, 3, 4, 8)


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return _coded.read(w, shards, bias, decode)


def decode(w: "Checkpoint", shard: "Shard") -> "Coded | None":
    c, name = w.config.quantization(), shard.name
    stored = c.get("format", "pack-quantized")
    if stored not in FORMATS:
        raise Unsupported(
            f"compressed-tensors of format '{stored}' is not supported.",
            hint=f"known: {', '.join(FORMATS)}",
        )
    meant = name != "lm_head" and not listed(name, c.get("ignore"))
    if w.has(f"{name}.weight_packed", otherwise=meant and "pack-quantized" in stored):
        usual = torch.int32 if stored == "pack-quantized" else torch.uint8
        size = (shard.out_features, shard.in_features // (8 if usual is torch.int32 else 2))
        _, dtype = w.find(f"{name}.weight_packed", size, usual)
        return _four(w, shard) if dtype is torch.uint8 else _packed(w, shard)
    if not w.has(f"{name}.weight_scale", otherwise=meant and stored != "dense"):
        return None
    w.pass_over(f"{name}.input_scale", f"{name}.input_zero_point", f"{name}.weight_shape")
    default = torch.float8_e4m3fn if stored == "float-quantized" else torch.int8
    _, dtype = w.find(f"{name}.weight", (shard.out_features, shard.in_features), default)
    if w.has(f"{name}.weight_zero_point", otherwise=False):
        raise Unsupported(
            f"{name} is stored as whole bytes with zero points, which is not supported.",
            hint="use a version of the model that is packed or symmetric",
        )
    block = _bytes.block_of(_weights(c), "block_structure")
    return _bytes.read(w, shard, f"{name}.weight", f"{name}.weight_scale", dtype, block)


def _packed(w: "Checkpoint", s: "Shard") -> "Coded":
    name, n, k = s.name, s.out_features, s.in_features
    c = _weights(w.config.quantization())
    bits, group = c.integer("num_bits", 4), c.integer("group_size", k)
    (_, words), _ = w.find(f"{name}.weight_packed", (n, -(-k * bits // 32)), torch.int32)
    bits = bits_of(name, words, k, bits, BITS)
    (_, groups), dtype = w.find(f"{name}.weight_scale", (n, -(-k // group)), torch.bfloat16)
    codes = packed(w, f"{name}.weight_packed", (n, k), (s.rows, s.cols), 1, bits)
    scale = w.read(f"{name}.weight_scale", (n, groups), (s.rows, None), dtype)
    zero = None
    if w.has(f"{name}.weight_zero_point", otherwise=not c.flag("symmetric", True)):
        zero = packed(w, f"{name}.weight_zero_point", (n, groups), (s.rows, None), 0, bits)
    if w.has(f"{name}.weight_g_idx", otherwise=False):
        index = w.read(f"{name}.weight_g_idx", (k,), (s.cols,), torch.int32).long()
    else:
        index = groups_of(w, k, -(-k // groups), s.cols)
    w.pass_over(f"{name}.weight_shape")
    return _coded.affine(codes, scale, zero, bits, index)


def _four(w: "Checkpoint", s: "Shard") -> "Coded":
    """e2m1 with scales that are powers of two for 32 columns, or e4m3 for 16 and one for all."""
    name, n, k = s.name, s.out_features, s.in_features
    (_, groups), dtype = w.find(f"{name}.weight_scale", (n, -(-k // 32)), torch.uint8)
    codes = halves(w, f"{name}.weight_packed", (n, k), (s.rows, s.cols))
    scale = w.read(f"{name}.weight_scale", (n, groups), (s.rows, None), dtype).float()
    if dtype is torch.uint8:
        scale = torch.exp2(scale - 127)
    if w.has(f"{name}.weight_global_scale", otherwise=False):
        full = f"{name}.weight_global_scale"
        shape, _ = w.find(full, (1,), torch.float32, any_rank=True)
        scale = scale / w.read(full, shape, None, torch.float32).reshape(1, 1)
    w.pass_over(f"{name}.input_global_scale", f"{name}.weight_shape")
    table = torch.tensor(E2M1, device=w.device)
    return _coded.grouped(codes, scale, groups_of(w, k, -(-k // groups), s.cols), table=table)


def _weights(c: HFConfig) -> HFConfig:
    """What the first group of modules says of its weights."""
    found = c.get("config_groups", {})
    first: object = next(iter(found.values()), None) if isinstance(found, dict) else None
    values = first.get("weights") if isinstance(first, dict) else None
    said = dict(values) if isinstance(values, dict) else {}
    if said.get("group_size") in (0, -1):
        said["group_size"] = None
    return HFConfig({**said, "model_type": "weights"}, "config_groups")
