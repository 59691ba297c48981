"""GPTQ: codes packed along the input columns, scales and zeros for groups of them.

Source: AutoGPTQ and GPTQModel. Version 1 of the format stores a zero less one. Files that say
`sym` are read with the zero that this means, half the range: some of them are labelled with the
wrong version.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kvrun.errors import BadCheckpoint
from kvrun.runtime.quant import _coded
from kvrun.runtime.quant._cut import bits_of, groups_of, packed

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.kernels.w4a16 import Coded
    from kvrun.runtime.quant import Weight

BITS = (2, 3, 4, 8)


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return _coded.read(w, shards, bias, decode)


def decode(w: "Checkpoint", shard: "Shard") -> "Coded | None":
    c, name, n, k = w.config.quantization(), shard.name, shard.out_features, shard.in_features
    here = name != "lm_head" or c.flag("lm_head", False)
    if not w.has(f"{name}.qweight", otherwise=here):
        return None
    bits = c.integer("bits", 4)
    group = k if c.get("group_size", 128) == -1 else c.integer("group_size", 128)
    int32 = torch.int32
    (words, _), _ = w.find(f"{name}.qweight", (-(-k // (32 // bits)), n), int32)
    bits = bits_of(name, words, k, bits, BITS)
    (groups, _), dtype = w.find(f"{name}.scales", (-(-k // group), n), torch.float16)
    codes = packed(w, f"{name}.qweight", (k, n), (shard.cols, shard.rows), 0, bits)
    scale = w.read(f"{name}.scales", (groups, n), (None, shard.rows), dtype)
    zero = None
    if _symmetric(w, name):
        w.pass_over(f"{name}.qzeros")
    else:
        zero = packed(w, f"{name}.qzeros", (groups, n), (None, shard.rows), 1, bits).t().short()
        zero = zero + (c.get("checkpoint_format", "gptq") != "gptq_v2")
    if w.has(f"{name}.g_idx", otherwise=False):
        index = w.read(f"{name}.g_idx", (k,), (shard.cols,), int32).long()
    else:
        index = groups_of(w, k, -(-k // groups), shard.cols)
    return _coded.affine(codes.t(), scale.t(), zero, bits, index)


def _symmetric(w: "Checkpoint", name: str) -> bool:
    """What the configuration says of this matrix; `dynamic` holds exceptions by pattern."""
    c = w.config.quantization()
    rules = c.get("dynamic", {})
    for rule, values in rules.items() if isinstance(rules, dict) else ():
        try:
            found = re.match(rule.removeprefix("+:"), name)
        except re.error as error:
            raise BadCheckpoint(
                f"the quantization config has the rule '{rule[:60]}'.",
                cause=f"it is no pattern: {error}",
                hint="fetch the model again",
            ) from error
        if found and isinstance(values, dict) and isinstance(values.get("sym"), bool):
            return bool(values["sym"])
    return c.flag("sym", True)
