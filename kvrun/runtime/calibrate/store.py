"""How codes are written: tensors of a matrix, and what config.json says of them.

compressed-tensors for integers and e4m3, bitsandbytes for nf4.
"""

import json
from typing import Any

import torch

from kvrun.runtime.quant import _round
from kvrun.runtime.quant._cut import unpack
from kvrun.runtime.quant._round import Codes

CALIBRATED = ("gptq", "awq")
BITS = {"int8": 8, "int4": 4, "gptq": 4, "awq": 4}
Tensors = dict[str, torch.Tensor]


def integers(made: Codes) -> tuple[Tensors, torch.Tensor]:
    """Packed codes and scales, by suffix; the values [N, K] that a reader makes of them.

    Codes have no zeros: current readers do not agree on how those are packed.
    """
    assert made.zero is None
    return {
        "weight_packed": _words(made.codes, made.bits),
        "weight_scale": made.scale.contiguous(),
        "weight_shape": torch.tensor(made.codes.shape),
    }, made.values()


def values_of(tensors: Tensors, bits: int) -> torch.Tensor:
    """What `integers` has written, as values [N, K]."""
    codes = unpack(tensors["weight_packed"], bits)[:, : int(tensors["weight_shape"][1])]
    return Codes(codes, tensors["weight_scale"], None, bits).values()


def e4m3(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale = _round.e4m3(weight)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def nf4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    n, k = weight.shape
    flat = weight.reshape(1, -1)  # blocks run over the flattened matrix
    codes, scale, table = _round.by_table(flat, "nf4", _round.BLOCK)
    size = _round.BLOCK
    values = (table[codes.int()].view(-1, size) * scale.view(-1, 1)).view(n, k)
    pairs = codes.view(-1, 2)
    state = {"quant_type": "nf4", "blocksize": size, "dtype": str(weight.dtype).split(".")[-1],
             "shape": [n, k]}  # fmt: skip
    return {
        "weight": (pairs[:, :1] << 4 | pairs[:, 1:]).contiguous(),
        "weight.absmax": scale.flatten(),
        "weight.quant_map": table,
        "weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }, values


def configuration(method: str, group: int | None, ignore: list[str]) -> dict[str, Any]:
    """`quantization_config`; `group` None: a scale for each row."""
    if method == "nf4":
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
            "llm_int8_skip_modules": ignore,
        }  # fmt: skip
    weights: dict[str, Any] = {
        "num_bits": BITS.get(method, 8), "type": "float" if method == "fp8" else "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group", "dynamic": False,
    }  # fmt: skip
    if group is not None:
        weights["group_size"] = group
    scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if method == "fp8":
        scheme["input_activations"] = {
            "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token",
            "dynamic": True,
        }  # fmt: skip
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized" if method == "fp8" else "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ignore,
    }


def _words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [N, K] -> int32 [N, ceil(K · bits / 32)], the lowest bits first."""
    per = 32 // bits
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % per)).reshape(len(codes), -1, per)
    words = torch.zeros(codes.shape[:2], dtype=torch.int32, device=codes.device)
    for place in range(per):
        words |= codes[:, :, place].int() << (bits * place)
    return words
