"""Pickled weights -> safetensors, in a process of its own: python -m kvrun.hub.convert FOLDER OUT.

torch reads them with weights_only, which makes tensors and nothing else; the process is limited
in case that fails. Tensors are written one by one, so memory holds little more than the largest.
"""

import json
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from kvrun.hub.choose import ADAPTER, ADAPTER_BIN, BIN, BIN_INDEX, SAFE, SAFE_INDEX
from kvrun.hub.limits import confine, tell

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
SPARE = 1 << 30  # bytes for what torch needs beside the tensors
Tensors = dict[str, torch.Tensor]


class Refused(Exception):
    """What is wrong with a file."""


def main(folder: Path, out: Path) -> None:
    """Write what FOLDER holds as pickles to OUT, as safetensors of the same names."""
    files = sources(folder)
    sizes = [(folder / name).stat().st_size for name in files]
    torch.set_num_threads(1)
    confine(2 * max(sizes) + SPARE, 2 * max(sizes) + SPARE)
    where: dict[str, str] = {}
    total = 0
    for name in files:
        tell(say=f"writing {name} as safetensors")
        tensors = read(folder / name)
        made = target(name)
        total += write(out / made, tensors)
        where |= dict.fromkeys(tensors, made)
    if len(files) > 1 or files[0] not in (BIN, ADAPTER_BIN):
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (out / SAFE_INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))


def sources(folder: Path) -> list[str]:
    """The pickled files of a model or an adapter."""
    for name in (BIN, ADAPTER_BIN):
        if (folder / name).is_file():
            return [name]
    try:
        where = json.loads((folder / BIN_INDEX).read_bytes())["weight_map"]
        names = sorted({str(name) for name in where.values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Refused(f"{BIN_INDEX} cannot be read: {error!r}") from error
    lost = [name for name in names if "/" in name or not (folder / name).is_file()]
    if lost or not names:
        raise Refused(f"{BIN_INDEX} names {', '.join(lost[:3]) or 'no files'}")
    return names


def target(name: str) -> str:
    """The name as safetensors: model-00001-of-00002 of pytorch_model-00001-of-00002."""
    if name == ADAPTER_BIN:
        return ADAPTER
    if name == BIN:
        return SAFE
    return name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


def read(path: Path) -> Tensors:
    """The tensors of a file by name; of several names of the same memory only the first."""
    try:
        values: Any = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except MemoryError:
        raise
    except Exception as error:  # torch raises many kinds for damaged and for forbidden files
        if "memory" in str(error).lower():
            raise MemoryError(str(error)) from error
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = "is damaged, or holds more than tensors"
        if forbidden:
            why = f"asks for {forbidden[1][:80]}, which may run code"
        raise Refused(f"{path.name} {why}") from error
    if not isinstance(values, dict) or not values:
        raise Refused(f"{path.name} holds no tensors by name")
    found: Tensors = {}
    seen = set()
    for name, tensor in values.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise Refused(f"{path.name} holds more than tensors: {str(name)[:80]}")
        if tensor.layout is not torch.strided or tensor.dtype not in DTYPES:
            raise Refused(f"{path.name}: {name[:80]} is {tensor.layout}, {tensor.dtype}")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        found[name] = tensor.detach()
    return found


def write(path: Path, tensors: Tensors) -> int:
    """Write a safetensors file; the bytes of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for piece in _bytes(tensors[name] for name in order):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return at


def _bytes(tensors: Iterator[torch.Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        if tensor.numel():
            yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except Refused as error:
        tell(refused=str(error))
        sys.exit(1)
    except MemoryError:
        tell(memory=True)
        sys.exit(1)
    except RuntimeError as error:  # torch says so in this way
        tell(**({"memory": True} if "memory" in str(error) else {"refused": str(error)[:200]}))
        sys.exit(1)
