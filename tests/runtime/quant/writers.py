"""Stored formats written plainly, from their definitions: tensors of a matrix, and its values."""

import json
from collections.abc import Sequence
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(values: Sequence[int], bits: int) -> list[int]:
    """Values in a stream of bits, the lowest first, as signed words of 32."""
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    count = -(-len(values) * bits // 32)
    found = [stream >> (32 * i) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def pack(matrix: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Whole numbers [a, b] packed along `dim`."""
    rows = matrix if dim else matrix.t()
    packed = torch.tensor([words(row, bits) for row in rows.tolist()], dtype=torch.int32)
    return packed if dim else packed.t().contiguous()


def codes(weight: torch.Tensor, bits: int, groups: torch.Tensor, sym: bool) -> tuple[Any, ...]:
    """Codes [N, K], scales f16 [N, G] and zeros [N, G]; `groups` [K] says whose scale counts."""
    n, count, top = len(weight), int(groups.max()) + 1, 2**bits - 1
    scale, zero = torch.zeros(n, count), torch.zeros(n, count, dtype=torch.int64)
    for g in range(count):
        part = weight[:, groups == g]
        if sym:
            scale[:, g] = 2 * part.abs().amax(1) / top
            zero[:, g] = 2 ** (bits - 1)
        else:
            low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
            scale[:, g] = (high - low) / top
            zero[:, g] = (-low / scale[:, g]).round().clamp(1, top)
    scale = scale.half()
    code = (weight / scale[:, groups].float()).round().long() + zero[:, groups]
    return code.clamp(0, top), scale, zero


def values(
    code: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, groups: torch.Tensor
) -> Any:
    return (code - zero[:, groups]).float() * scale[:, groups].float()


def gptq(
    weight: torch.Tensor, bits: int, group: int, *, sym: bool, v2: bool = False, act: bool = False
) -> tuple[Tensors, torch.Tensor]:
    k = weight.shape[1]
    groups = torch.arange(k) // (k if group == -1 else group)
    if act:
        groups = groups[torch.randperm(k, generator=torch.Generator().manual_seed(1))]
    code, scale, zero = codes(weight, bits, groups, sym)
    return {
        "qweight": pack(code.t(), bits, 0),
        "qzeros": pack(zero.t() - (0 if v2 else 1), bits, 1),
        "scales": scale.t(),
        "g_idx": groups.int(),
    }, values(code, scale, zero, groups)


def awq(weight: torch.Tensor, group: int, *, gemv: bool = False) -> tuple[Tensors, torch.Tensor]:
    groups = torch.arange(weight.shape[1]) // group
    code, scale, zero = codes(weight, 4, groups, False)
    ref = values(code, scale, zero, groups)
    if gemv:
        room = -scale.shape[1] % 8
        pad = torch.nn.functional.pad
        return {
            "qweight": pack(code, 4, 1),
            "qzeros": pack(pad(zero, (0, room)), 4, 1),
            "scales": pad(scale, (0, room)),
        }, ref

    def shuffled(matrix: torch.Tensor) -> torch.Tensor:
        return pack(matrix.t().reshape(-1, len(matrix) // 8, 8)[:, :, AWQ_ORDER].flatten(1), 4, 1)

    return {"qweight": shuffled(code), "qzeros": shuffled(zero), "scales": scale.t()}, ref


def packed(weight: torch.Tensor, bits: int, group: int, *, sym: bool) -> tuple[Tensors, Any]:
    """compressed-tensors, pack-quantized."""
    groups = torch.arange(weight.shape[1]) // group
    code, scale, zero = codes(weight, bits, groups, sym)
    scale = scale.bfloat16()
    found = {
        "weight_packed": pack(code, bits, 1),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not sym:
        found["weight_zero_point"] = pack(zero, bits, 0)
    return found, values(code, scale, zero, groups)


def whole(weight: torch.Tensor, name: str) -> tuple[Tensors, torch.Tensor]:
    """int8 with a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    code = (weight / scale).round().to(torch.int8)
    return {"weight": code, name: scale}, code.float() * scale


def fp8(weight: torch.Tensor, kind: str, name: str, block: int = 32) -> tuple[Tensors, Any]:
    """e4m3 with a scale for the tensor, for each channel or for blocks."""
    n, k = weight.shape
    size = {"tensor": (n, k), "channel": (1, k), "block": (block, block)}[kind]
    rows, cols = torch.arange(n) // size[0], torch.arange(k) // size[1]
    scale = torch.zeros(int(rows.max()) + 1, int(cols.max()) + 1)
    for r in range(scale.shape[0]):
        for c in range(scale.shape[1]):
            scale[r, c] = weight[rows == r][:, cols == c].abs().max() / 448
    spread = scale[rows][:, cols]
    code = (weight / spread).to(torch.float8_e4m3fn)
    kept = scale.reshape(()) if kind == "tensor" else scale
    return {"weight": code, name: kept}, code.float() * spread


def e2m1(weight: torch.Tensor, kind: str) -> tuple[Tensors, torch.Tensor]:
    """compressed-tensors' mxfp4 and nvfp4."""
    n = len(weight)
    size = 32 if kind == "mxfp4" else 16
    points = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    most = weight.view(n, -1, size).abs().amax(2) / 6
    found: Tensors = {}
    if kind == "mxfp4":
        power = most.log2().ceil()
        found["weight_scale"], scale = (power + 127).to(torch.uint8), 2.0**power
    else:
        all_of_it = 448 / most.max()
        eight = (most * all_of_it).to(torch.float8_e4m3fn)
        found |= {"weight_scale": eight, "weight_global_scale": all_of_it.view(1)}
        scale = eight.float() / all_of_it
    spread = scale.repeat_interleave(size, 1)
    code = (weight / spread).unsqueeze(-1).sub(points).abs().argmin(-1)
    found["weight_packed"] = (code[:, ::2] + 16 * code[:, 1::2]).to(torch.uint8)
    return found, points[code] * spread


def four(
    weight: torch.Tensor, kind: str, table: Sequence[float], *, nested: bool, size: int = 64
) -> tuple[Tensors, torch.Tensor]:
    """bitsandbytes in 4 bits."""
    n, k = weight.shape
    points = torch.tensor(table)
    flat = torch.nn.functional.pad(weight.flatten(), (0, -n * k % size)).view(-1, size)
    absmax = flat.abs().amax(1)
    found: Tensors = {}
    state: dict[str, Any] = {"quant_type": kind, "blocksize": size, "shape": [n, k]}
    if nested:
        offset, eight = float(absmax.mean()), torch.linspace(-1, 1, 256)
        blocks = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        most = blocks.abs().amax(1)
        code = (blocks / most[:, None]).unsqueeze(-1).sub(eight).abs().argmin(-1)
        found |= {
            "weight.absmax": code.flatten()[: len(absmax)].to(torch.uint8),
            "weight.nested_absmax": most,
            "weight.nested_quant_map": eight,
        }
        state |= {"nested_blocksize": 256, "nested_offset": offset}
        absmax = (eight[code] * most[:, None]).flatten()[: len(absmax)] + offset
    else:
        found["weight.absmax"] = absmax
    code = (flat / absmax[:, None]).unsqueeze(-1).sub(points).abs().argmin(-1)
    ref = (points[code] * absmax[:, None]).flatten()[: n * k].view(n, k)
    pairs = code.flatten()[: n * k].view(-1, 2)
    name = f"weight.quant_state.bitsandbytes__{kind}"
    found |= {
        "weight": (pairs[:, :1] * 16 + pairs[:, 1:]).to(torch.uint8),
        "weight.quant_map": points,
        name: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    return found, ref


def torchao(weight: torch.Tensor, kind: str, group: int) -> tuple[Tensors, torch.Tensor]:
    """Int8Tensor and IntxUnpackedToInt8Tensor of 8 or 4 bits, Int4Tensor, Float8Tensor."""
    name = "_weight_{}".format
    n, k = weight.shape
    if kind.startswith("float8"):
        tensors, ref = fp8(weight, kind.split("-")[1], name("scale"))
        return {name("qdata"): tensors["weight"], name("scale"): tensors[name("scale")]}, ref
    size = k if group == -1 else group
    parts = weight.view(n, -1, size)
    if kind == "int4":  # (code in -8 .. 7) times scale, plus an offset
        low, high = parts.amin(2, True), parts.amax(2, True)
        scale = ((high - low) / 15).bfloat16()
        offset = (low + 8 * scale.float()).bfloat16()
        code = ((parts - offset.float()) / scale.float()).round().clamp(-8, 7)
        ref = (code * scale.float() + offset.float()).view(n, k)
        pairs = code.view(n, -1, 2).long() & 15
        return {
            name("qdata"): (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8).view(torch.int8),
            name("scale"): scale[..., 0].t(),
            name("zero_point"): offset[..., 0].t(),
        }, ref
    top = 127 if kind.endswith("8") else 7
    scale = parts.abs().amax(2, True) / top
    zero = torch.zeros_like(scale) if kind == "int8" else torch.full_like(scale, -1)
    code = ((parts / scale).round() + zero).clamp(-top - 1, top)
    ref = ((code - zero) * scale).view(n, k)
    return {
        name("qdata"): code.view(n, k).to(torch.int8),
        name("scale"): scale[..., 0],
        name("zero_point"): zero[..., 0].to(torch.int8),
    }, ref


def hqq(
    weight: torch.Tensor, bits: int, group: int, *, axis: int = 1, floats: bool = False
) -> tuple[Tensors, torch.Tensor]:
    """Groups are rows (axis 1) or columns (axis 0) of the matrix in another shape."""
    flat = weight.reshape((-1, group) if axis else (group, -1))
    low, high = flat.amin(axis, True), flat.amax(axis, True)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).half()
    code = (flat / scale.float() + zero.float()).round().clamp(0, 2**bits - 1)
    ref = ((code - zero.float()) * scale.float()).view(weight.shape)
    per = 10 if bits == 3 else 8 // bits
    padded = torch.nn.functional.pad(code.long(), (0, 0, 0, -len(code) % per))
    parts = padded.view(per, -1, padded.shape[1])
    total = sum(part << bits * (per - 1 - i) for i, part in enumerate(parts))
    assert isinstance(total, torch.Tensor)
    stored = total.to(torch.int32 if bits == 3 else torch.uint8)
    said = {"nbits": bits, "group_size": group, "axis": axis, "view_as_float": int(floats)}
    return {
        "W_q": stored.view(torch.float16) if floats else stored,
        "scale": scale,
        "zero": zero,
        "shape": torch.tensor(weight.shape),
        "packing": torch.tensor(list(f"{bits}bit_u8".encode()), dtype=torch.uint8),
        **{name: torch.tensor(value, dtype=torch.int32) for name, value in said.items()},
    }, ref
