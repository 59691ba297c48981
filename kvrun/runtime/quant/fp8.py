"""fp8: e4m3 with a scale for the matrix, for rows or for blocks. Source: transformers,
quantizers/quantizer_finegrained_fp8.py, and DeepSeek's checkpoints.

`weight_scale_inv` is a factor, whatever its name says. A scale for activations is not needed:
rows are multiplied in 16 bits, or get their scale when they come.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvrun.runtime.quant import _bytes, _coded
from kvrun.runtime.quant._names import listed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.kernels.w4a16 import Coded
    from kvrun.runtime.quant import Weight


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return _coded.read(w, shards, bias, decode)


def decode(w: "Checkpoint", shard: "Shard") -> "Coded | None":
    c, name = w.config.quantization(), shard.name
    kept = name == "lm_head" or any(
        listed(name, c.get(key)) for key in ("modules_to_not_convert", "ignored_layers")
    )
    block = _bytes.block_of(c, "weight_block_size")
    for suffix in ("weight_scale_inv", "weight_scale"):
        usual = (suffix == "weight_scale_inv") == (block is not None)
        if w.has(f"{name}.{suffix}", otherwise=not kept and usual):
            w.pass_over(f"{name}.input_scale", f"{name}.activation_scale", f"{name}.input_scale_ub")
            dtype = torch.float8_e4m3fn
            return _bytes.read(w, shard, f"{name}.weight", f"{name}.{suffix}", dtype, block)
    return None
