"""Quantized checkpoints of every family beside plain ones that hold the values of their codes.

What is a matrix, and which of them are quantized, is said here once more, by the names and shapes
in the files; which values codes stand for, by the writers of each format.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrun.runtime.config import QUANTIZE
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.quant import _round, dense
from kvrun.runtime.quant._cpu import Int4, Int8, Native
from tests.runtime.models import every, zoo
from tests.runtime.quant import formats, writers

Tensors = dict[str, torch.Tensor]
Values = Callable[[torch.Tensor], torch.Tensor]

_TURNED = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn|kv_attn)\.weight$")  # of GPT-2: [in, out]
_ROUTER = re.compile(r"\.(gate|router|router\.layer|shared_expert_gate)\.weight$")
# Tables, norms by head, convolutions, decays: nothing that multiplies rows. Towers stay plain.
_NONE = re.compile(r"(relative_attention_bias|norm|conv1d)\.weight$|vision_model|perceiver")
_HEAD = re.compile(r"(lm_head|embed_out|additional_fc)\.weight$")
# What makes logits where there is no head.
_TABLE = re.compile(r"(embed_tokens|wte|word_embeddings|shared|embed_in|embeddings)\.weight$")
_STACK = re.compile(r"experts\.(gate_up_proj|down_proj)$|(input|output)_linear\.weight$")
_FLAT = re.compile(r"experts\.mlp\.(w1|v1|w2)$")  # of DBRX: experts one below the other


def matrices(tensors: Tensors) -> list[str]:
    """The products of a file's layers, but those of experts in one tensor."""
    found = [n for n, t in tensors.items() if t.ndim == 2 and re.search(r"\.\d+\.", n)]
    return [n for n in found if n.endswith(".weight") and not _NONE.search(n)]


def routes(name: str) -> bool:
    return _ROUTER.search(name) is not None


def turned(name: str, family: str) -> bool:
    return family == "gpt2" and _TURNED.search(name) is not None


def rounded(folder: Path, family: str, method: str, device: str = "cpu") -> Tensors:
    """The file's tensors with the values that rounding on a device makes of each matrix of the
    layers, and of what makes logits."""

    def values(matrix: torch.Tensor) -> torch.Tensor:
        return w4a16.dequantise(_round.coded(matrix.contiguous(), method), torch.float32)

    tensors = load_file(folder / "model.safetensors")
    if method != "fp8" or device != "cpu":  # of which a CPU has no product
        heads = [n for n in tensors if _HEAD.search(n)]
        for head in heads or [next(n for n in tensors if _TABLE.search(n))]:
            codes = _round.coded(tensors[head], "fp8" if method == "fp8" else "int8")
            tensors[head] = w4a16.dequantise(codes, torch.float32)
    for name in [n for n in matrices(tensors) if not routes(n)]:
        tensors[name] = either_way(values, tensors[name], turned(name, family))
    for name, stack in tensors.items():
        if stack.ndim == 3 and _STACK.search(name):
            back = family in ("gpt_oss", "llama4_text")
            tensors[name] = torch.stack([either_way(values, one, back) for one in stack])
        elif _FLAT.search(name):
            back, parts = name.endswith("w2"), stack.chunk(5)
            tensors[name] = torch.cat([either_way(values, one, back) for one in parts])
    return tensors


def either_way(values: Values, matrix: torch.Tensor, back: bool) -> torch.Tensor:
    return values(matrix.t()).t() if back else values(matrix)


# Some forms of each format; the others differ in what a single matrix shows.
FORMS = {
    "gptq": ["gptq-order", "gptq-sym"],
    "awq": ["awq-gemm"],
    "compressed-tensors": ["packed-4bit-zero", "int-quantized", "float-channel", "nvfp4", "mxfp4"],
    "fp8": ["fp8-block"],
    "fbgemm_fp8": ["fbgemm"],
    "bitsandbytes": ["nf4-double", "bitsandbytes-int8"],
    "torchao": ["torchao-int4", "torchao-intx4", "torchao-float8-channel"],
    "hqq": ["hqq-4bit"],
}


def fits(form: str, matrix: torch.Tensor) -> bool:
    """Whether the tools that write a format could store this matrix in it; others stay plain."""
    n, k = matrix.shape
    sizes = {"gptq": 8, "awq": 8, "packed": 8, "nvfp4": 16, "mxfp4": 32, "torchao-int": 32}
    size = next((size for kind, size in sizes.items() if form.startswith(kind)), 1)
    return k % size == 0 and n % min(size, 8) == 0 and n * k % 32 == 0


def stored(folder: Path, family: str, form: str) -> tuple[dict[str, Any], Tensors, Tensors]:
    """What config.json says, the file's tensors in a form, and with the values of their codes."""
    values = load_file(folder / "model.safetensors")
    said, _ = formats.FORMATS[form]
    files = dict(values)
    for name in matrices(values):
        back = turned(name, family)
        matrix = values[name].t().contiguous() if back else values[name]
        if routes(name) or not fits(form, matrix):
            continue
        parts, ref = write(form, matrix)
        del files[name]
        files |= {f"{name.removesuffix('weight')}{part}": t for part, t in parts.items()}
        values[name] = ref.t() if back else ref
    assert files.keys() != values.keys() or any(
        files[n].dtype is not values[n].dtype for n in files
    )
    return said, files, values


def write(form: str, matrix: torch.Tensor) -> tuple[writers.Tensors, torch.Tensor]:
    """In groups of 32 columns, or of 8 where these do not cut the matrix evenly."""
    size = 32 if matrix.shape[1] % 32 == 0 else 8
    if form.startswith("gptq"):
        return writers.gptq(matrix, 4, size, sym=form == "gptq-sym", act=form == "gptq-order")
    if form == "awq-gemm":
        return writers.awq(matrix, size)
    if form == "packed-4bit-zero":
        return writers.packed(matrix, 4, size, sym=False)
    return formats.FORMATS[form][1](matrix)


def difference(folder: Path, place: Path, family: str, way: str, ranks: int = 1) -> float:
    """How far the logits of codes, in one of the `FORMS` or rounded as they are read, are from
    those of their values."""
    if way in QUANTIZE:
        said, files, values = None, None, rounded(folder, family, way)
    else:
        said, files, values = stored(folder, family, way)
    plain = every.logits(every.driver(copied(folder, place / "plain", values), family))
    if files is None:
        found = [every.logits(every.driver(folder, family, quantize=way))]
    else:
        model = copied(folder, place / "coded", files, said)
        found = every.on_ranks(model, family, ranks)
    return max(float((logits - plain).abs().max()) for logits in found)


def copied(folder: Path, new: Path, files: Tensors, said: dict[str, Any] | None = None) -> Path:
    """The model of `folder` in a new one with other tensors, quantized as config.json says."""
    new.mkdir()
    shutil.copy(folder / "config.json", new)
    save_file({n: t.contiguous() for n, t in files.items()}, new / "model.safetensors")
    if said is not None:
        zoo.edit_config(new, quantization_config=said)
    return new


def exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU's kernels of codes round rows; here they multiply the values of the codes."""

    def lay_out(self: Any, matrix: w4a16.Coded, bias: torch.Tensor | None) -> None:
        values = w4a16.dequantise(matrix._replace(order=None), torch.float32)
        self.matmul, self.nbytes = dense.Plain(values, bias).matmul, matrix.nbytes
        self.rows = lambda ids, dtype: values[ids].to(dtype)
        self.takes_in = lambda rows: False

    for kernel in (Native, Int4, Int8):
        monkeypatch.setattr(kernel, "__init__", lay_out)
