"""bitsandbytes: int8 with a scale for each row, or 4-bit codes of a table in flat blocks.

Source: bitsandbytes 0.50, functional.py. Of two codes in a byte the first is the higher half;
blocks run over the flattened matrix, and their scales may be codes of 8 bits themselves.
"""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.quant import _coded
from kvrun.runtime.quant._bytes import places
from kvrun.runtime.quant._names import listed
from kvrun.runtime.quant._tables import TABLES

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard
    from kvrun.runtime.quant import Weight

_SIZES = ("blocksize", "nested_blocksize")
INT8 = 127.0  # the largest code, which stands for a row's largest value


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> "Weight":
    return _coded.read(w, shards, bias, decode)


def decode(w: "Checkpoint", shard: "Shard") -> _coded.Found:
    c, name = w.config.quantization(), shard.name
    kept = name == "lm_head" or listed(name, c.get("llm_int8_skip_modules"))
    eight = c.flag("load_in_8bit", False)
    if w.has(f"{name}.SCB", otherwise=eight and not kept):
        return _eight(w, shard)
    if w.has(f"{name}.weight.absmax", otherwise=not eight and not kept):
        return _four(w, shard)
    return None


def _eight(w: "Checkpoint", s: "Shard") -> _coded.Found:
    if w.has(f"{s.name}.weight_format", otherwise=False):
        shape, dtype = w.find(f"{s.name}.weight_format", (), torch.uint8, any_rank=True)
        if int(w.read(f"{s.name}.weight_format", shape, None, dtype).sum()):
            raise Unsupported(
                f"{s.name} is stored in a layout of one kind of GPU.",
                hint="save the model again with a current bitsandbytes",
            )
    n, k = s.out_features, s.in_features
    codes = w.read(f"{s.name}.weight", (n, k), (s.rows, s.cols), torch.int8)
    scale = w.read(f"{s.name}.SCB", (n,), (s.rows,), torch.float32) / INT8
    codes = codes.view(torch.uint8) ^ 128
    return _coded.grouped(codes, scale.view(-1, 1), places(k, s.cols, w) * 0, bits=8)


def _four(w: "Checkpoint", s: "Shard") -> _coded.Found:
    name, n, k = f"{s.name}.weight", s.out_features, s.in_features
    state = _state(w, name)
    size = int(state.get("blocksize", 64))
    shape, dtype = w.find(name, (n * k // 2, 1), torch.uint8, any_rank=True)
    stored = w.read(name, shape, None, dtype).view(torch.uint8).flatten()
    scale = _scales(w, name, state, -(-n * k // size))
    if list(state.get("shape", [n, k])) != [n, k] or stored.numel() != -(-n * k // 2):
        raise BadCheckpoint(
            f"{name} does not hold the [{n}, {k}] values that config.json describes.",
            hint="fetch the model again",
        )
    kind = str(state.get("quant_type", w.config.quantization().get("bnb_4bit_quant_type", "fp4")))
    if kind not in TABLES:
        raise Unsupported(f"{name} is stored as '{kind}'.", hint=f"known: {', '.join(TABLES)}")
    table = torch.tensor(TABLES[kind], device=w.device)
    if w.has(f"{name}.quant_map", otherwise=False):
        table = w.read(f"{name}.quant_map", (16,), None, torch.float32)
    codes = torch.stack([stored >> 4, stored & 15], 1).flatten()[: n * k].view(n, k)
    rows, cols = places(n, s.rows, w), places(k, s.cols, w)
    codes = codes[rows][:, cols]
    if k % size == 0:
        return _coded.grouped(codes, scale.view(n, -1)[rows], cols // size, table=table)
    # Blocks that run across rows: no group of columns has a scale of its own.
    blocks = (rows.view(-1, 1) * k + cols) // size
    return (table[codes.int()] * scale[blocks]).to(w.dtype)


def _state(w: "Checkpoint", name: str) -> dict[str, Any]:
    """The JSON that a tensor of bytes holds."""
    for kind in TABLES:
        full = f"{name}.quant_state.bitsandbytes__{kind}"
        if w.has(full, otherwise=False):
            shape, dtype = w.find(full, (1,), torch.uint8)
            raw = bytes(w.read(full, shape, None, dtype).cpu().numpy())
            try:
                state = json.loads(raw)
            except ValueError as error:
                raise BadCheckpoint(f"{full} is not JSON.", hint="fetch the model again") from error
            sizes = [state.get(key, 64) for key in _SIZES] if isinstance(state, dict) else [0]
            if not all(type(size) is int and size > 0 for size in sizes):
                raise BadCheckpoint(f"{full} does not say how blocks are stored.",
                                    hint="fetch the model again")  # fmt: skip
            return dict(state)
    return {}


def _scales(w: "Checkpoint", name: str, state: dict[str, Any], blocks: int) -> torch.Tensor:
    """fp32 [blocks], decoded where they are codes of 8 bits."""
    _, dtype = w.find(f"{name}.absmax", (blocks,), torch.float32)
    if dtype is not torch.uint8:
        return w.read(f"{name}.absmax", (blocks,), None, torch.float32)
    codes = w.read(f"{name}.absmax", (blocks,), None, torch.uint8)
    size = int(state.get("nested_blocksize", 256))
    scale = w.read(f"{name}.nested_absmax", (-(-blocks // size),), None, torch.float32)
    table = w.read(f"{name}.nested_quant_map", (256,), None, torch.float32)
    values = table[codes.int()] * scale.repeat_interleave(size)[:blocks]
    return values + float(state.get("nested_offset", 0.0))
