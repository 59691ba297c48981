"""How codes are written: tensors of a matrix, and what config.json says of them, by format."""

import json
import re
from typing import Any

import torch

from kvrun.runtime.calibrate.solve import DAMPING
from kvrun.runtime.quant import _round
from kvrun.runtime.quant._cut import unpack
from kvrun.runtime.quant._round import Codes
from kvrun.runtime.quant.awq import ORDER
from kvrun.runtime.quant.bitsandbytes import INT8

CALIBRATED = ("gptq", "awq")
BITS = {"int8": 8, "int4": 4, "gptq": 4, "awq": 4}
# Formats that are written, and the methods that each has room for; the first is a method's usual.
FORMATS = {
    "compressed-tensors": ("int8", "int4", "gptq", "awq", "fp8"),
    "gptq": ("int4", "gptq", "awq", "int8"),
    "awq": ("int4", "awq", "gptq"),
    "bitsandbytes": ("nf4", "int8"),
}
HALF = ("gptq", "awq")  # formats whose scales are float16, whatever the model's dtype
Tensors = dict[str, torch.Tensor]


def usual(method: str) -> str:
    return next(name for name, methods in FORMATS.items() if method in methods)


def unit(form: str, bits: int) -> tuple[int, int]:
    """What the (out, in) features of a matrix must be multiples of."""
    per = 32 // bits
    return {"gptq": (per, per), "awq": (per, 1)}.get(form, (1, 1))


def integers(made: Codes, form: str) -> tuple[Tensors, torch.Tensor]:
    """Packed codes and scales, by suffix; the values [N, K] that a reader makes of them."""
    if form == "compressed-tensors":
        # Codes have no zeros: current readers do not agree on how those are packed.
        assert made.zero is None
        return {
            "weight_packed": _words(made.codes, made.bits),
            "weight_scale": made.scale.contiguous(),
            "weight_shape": torch.tensor(made.codes.shape),
        }, made.values()
    zero = made.zero
    if zero is None:
        zero = torch.full(made.scale.shape, 1 << (made.bits - 1), dtype=torch.uint8)
    scale, zero = made.scale.t().contiguous(), zero.t().to(made.codes.device)
    if form == "awq":
        return {
            "qweight": _words(_shuffled(made.codes.t()), made.bits),
            "qzeros": _words(_shuffled(zero), made.bits),
            "scales": scale,
        }, made.values()
    group = torch.arange(made.codes.shape[1], dtype=torch.int32) // made.group
    return {
        "qweight": _words(made.codes, made.bits).t(),
        "qzeros": _words(zero - 1, made.bits),  # as version 1 stores them
        "scales": scale,
        "g_idx": group,
    }, made.values()


def values_of(tensors: Tensors, bits: int, form: str) -> torch.Tensor:
    """What `integers` has written, as values [N, K]."""
    if form == "compressed-tensors":
        codes = unpack(tensors["weight_packed"], bits)[:, : int(tensors["weight_shape"][1])]
        return Codes(codes, tensors["weight_scale"], None, bits).values()
    if form == "awq":
        codes = unpack(tensors["qweight"], bits, ORDER).t()
        zero = unpack(tensors["qzeros"], bits, ORDER).t()
    else:
        codes = unpack(tensors["qweight"].t(), bits)
        zero = unpack(tensors["qzeros"], bits).t() + 1
    return Codes(codes, tensors["scales"].t(), zero, bits).values()


def e4m3(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    codes, scale = _round.e4m3(weight)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()


def rows(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """int8 as bitsandbytes has it: the largest value of a row is 127."""
    largest = weight.float().abs().amax(1)
    share = largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    codes = (weight.float() * (INT8 / share)).round_().clamp_(-INT8, INT8).to(torch.int8)
    return {
        "weight": codes,
        "SCB": largest,
        "weight_format": torch.tensor(0, dtype=torch.uint8),  # rows one after the other
    }, codes.float() * (largest / INT8).unsqueeze(1)


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


def configuration(method: str, form: str, group: int | None, plain: list[str]) -> dict[str, Any]:
    """`quantization_config`; `group` None: a scale for each row. `plain`: matrices that stay so."""
    bits = BITS.get(method, 8)
    if form == "bitsandbytes":
        return {
            "quant_method": form, "load_in_4bit": method == "nf4", "load_in_8bit": method == "int8",
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": False,
            "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8",
            "llm_int8_threshold": 6.0, "llm_int8_has_fp16_weight": False,
            "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_skip_modules": plain,
        }  # fmt: skip
    if form == "gptq":
        own = [re.escape(name) for name in plain if any(p.isdigit() for p in name.split("."))]
        return {
            "bits": bits, "group_size": group or -1, "damp_percent": DAMPING, "desc_act": False,
            "static_groups": False, "sym": True, "true_sequential": False, "lm_head": False,
            "quant_method": form, "checkpoint_format": "gptq",
            **({"dynamic": {f"-:{name}$": {} for name in own}} if own else {}),
        }  # fmt: skip
    if form == "awq":
        return {
            "quant_method": form, "zero_point": True, "group_size": group, "bits": bits,
            "version": "gemm", "modules_to_not_convert": plain,
        }  # fmt: skip
    return _compressed(method, group, plain)


def _compressed(method: str, group: int | None, ignore: list[str]) -> dict[str, Any]:
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


def _shuffled(matrix: torch.Tensor) -> torch.Tensor:
    """Columns in the order in which AWQ's words hold them."""
    return matrix.reshape(len(matrix), -1, len(ORDER))[:, :, list(ORDER)].flatten(1)
