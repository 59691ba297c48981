"""Every stored format that is read: what config.json says, and a writer of one matrix."""

from collections.abc import Callable
from typing import Any

import torch

from tests.runtime.quant import writers

Writer = Callable[[torch.Tensor], tuple[writers.Tensors, torch.Tensor]]

# The quantiles that nf4 is made of, and bitsandbytes' fp4: by their papers and sources.
_LOW = (-1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0)
_HIGH = (0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1)
NF4 = [*_LOW, *_HIGH]
FP4 = [v / 12 for v in (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)]


def _gptq(bits: int, group: int, **options: Any) -> tuple[dict[str, Any], Writer]:
    said = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "sym": options["sym"],
        "desc_act": options.get("act", False),
        "checkpoint_format": "gptq_v2" if options.get("v2") else "gptq",
    }
    return said, lambda weight: writers.gptq(weight, bits, group, **options)


def _awq(version: str, group: int) -> tuple[dict[str, Any], Writer]:
    said = {"quant_method": "awq", "bits": 4, "group_size": group, "version": version}
    return said, lambda weight: writers.awq(weight, group, gemv=version == "gemv")


def _packed(bits: int, group: int, sym: bool) -> tuple[dict[str, Any], Writer]:
    scheme = {"num_bits": bits, "type": "int", "symmetric": sym,
              "strategy": "group", "group_size": group}  # fmt: skip
    return _compressed("pack-quantized", scheme), lambda w: writers.packed(w, bits, group, sym=sym)


def _compressed(kind: str, weights: dict[str, Any], **scheme: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, **scheme}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups,
            "ignore": ["lm_head"], "quantization_status": "compressed"}  # fmt: skip


def _float(kind: str) -> tuple[dict[str, Any], Writer]:
    weights: dict[str, Any] = {"num_bits": 8, "type": "float", "strategy": kind}
    if kind == "block":
        weights["block_structure"] = [32, 32]
    said = _compressed("float-quantized", weights)
    return said, lambda weight: writers.fp8(weight, kind, "weight_scale")


def _e2m1(kind: str) -> tuple[dict[str, Any], Writer]:
    size = 32 if kind == "mxfp4" else 16
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": size}
    said = _compressed(f"{kind}-pack-quantized", weights)
    return said, lambda weight: writers.e2m1(weight, kind)


def _fp8(kind: str, **said: Any) -> tuple[dict[str, Any], Writer]:
    block = kind == "block"
    said = {"quant_method": "fp8", "weight_block_size": [32, 32] if block else None, **said}
    name = "weight_scale_inv" if block else "weight_scale"

    def write(weight: torch.Tensor) -> tuple[writers.Tensors, torch.Tensor]:
        tensors, ref = writers.fp8(weight, kind, name)
        if said.get("activation_scheme") == "static":
            tensors["input_scale"] = torch.tensor(0.1)
        return tensors, ref

    return said, write


def _bits4(kind: str, nested: bool) -> tuple[dict[str, Any], Writer]:
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    table = NF4 if kind == "nf4" else FP4
    return said, lambda weight: writers.four(weight, kind, table, nested=nested)


FORMATS: dict[str, tuple[dict[str, Any], Writer]] = {
    **{f"gptq-{bits}bit": _gptq(bits, 32, sym=False) for bits in (2, 3, 4, 8)},
    "gptq-sym": _gptq(4, 32, sym=True),
    "gptq-v2": _gptq(4, 32, sym=False, v2=True),
    "gptq-2bit-sym": _gptq(2, 32, sym=True),
    "gptq-8bit-channel": _gptq(8, -1, sym=True),
    "gptq-order": _gptq(4, 32, sym=False, act=True),
    "gptq-order-8bit": _gptq(8, 64, sym=True, act=True),
    "awq-gemm": _awq("gemm", 32),
    "awq-gemv": _awq("gemv", 32),
    "packed-4bit": _packed(4, 32, True),
    "packed-4bit-zero": _packed(4, 32, False),
    "packed-8bit": _packed(8, 64, True),
    "packed-2bit-zero": _packed(2, 32, False),
    "int-quantized": (
        _compressed("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
        lambda weight: writers.whole(weight, "weight_scale"),
    ),
    **{f"float-{kind}": _float(kind) for kind in ("tensor", "channel", "block")},
    "mxfp4": _e2m1("mxfp4"),
    "nvfp4": _e2m1("nvfp4"),
    "fp8-tensor-static": _fp8("tensor", activation_scheme="static"),
    "fp8-channel": _fp8("channel", activation_scheme="dynamic"),
    "fp8-block": _fp8("block", activation_scheme="dynamic"),
    "fbgemm": (
        {"quant_method": "fbgemm_fp8"},
        lambda weight: writers.fp8(weight, "channel", "weight_scale"),
    ),
    "nf4": _bits4("nf4", False),
    "nf4-double": _bits4("nf4", True),
    "fp4": _bits4("fp4", False),
}


def _int8(weight: torch.Tensor) -> tuple[writers.Tensors, torch.Tensor]:
    tensors, ref = writers.whole(weight, "SCB")
    scale = weight.abs().amax(1)
    return tensors | {"SCB": scale, "weight_format": torch.tensor(0, dtype=torch.uint8)}, ref


FORMATS["bitsandbytes-int8"] = ({"quant_method": "bitsandbytes", "load_in_8bit": True}, _int8)


def _torchao(kind: str, config: str, group: int = -1) -> tuple[dict[str, Any], Writer]:
    said = {"quant_method": "torchao", "modules_to_not_convert": ["lm_head"],
            "quant_type": {"default": {"_type": config, "_version": 2, "_data": {}}}}  # fmt: skip
    return said, lambda weight: writers.torchao(weight, kind, group)


def _hqq(bits: int, group: int, **options: Any) -> tuple[dict[str, Any], Writer]:
    params = {"nbits": bits, "group_size": group, "axis": options.get("axis", 1)}
    said = {"quant_method": "hqq", "skip_modules": ["lm_head"],
            "quant_config": {"weight_quant_params": params}}  # fmt: skip
    return said, lambda weight: writers.hqq(weight, bits, group, **options)


FORMATS |= {
    "torchao-int8": _torchao("int8", "Int8WeightOnlyConfig"),
    "torchao-intx8": _torchao("intx8", "IntxWeightOnlyConfig", 32),
    "torchao-intx4": _torchao("intx4", "IntxWeightOnlyConfig", 32),
    "torchao-int4": _torchao("int4", "Int4WeightOnlyConfig", 32),
    **{
        f"torchao-float8-{kind}": _torchao(f"float8-{kind}", "Float8WeightOnlyConfig")
        for kind in ("tensor", "channel", "block")
    },
    **{f"hqq-{bits}bit": _hqq(bits, 32) for bits in (1, 2, 3, 4, 8)},
    "hqq-axis0": _hqq(4, 64, axis=0),
    "hqq-across-rows": _hqq(4, 256),
    "hqq-floats": _hqq(4, 64, floats=True),
}
