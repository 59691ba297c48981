"""fuse: a model's folder with an adapter added to its weights, written as a model of its own."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvrun.errors import InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.lora.adapter import AdapterFolder, read_config
from kvrun.runtime.lora.sites import Sites
from kvrun.runtime.tensorfile import Stored, TensorFile, TensorFolder

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Of a model's folder, beside its weights: configurations, tokenizer, chat template.
_COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
Progress = Callable[[int, int], None]


def fuse(
    model: str | Path, adapter: str | Path, out: str | Path, progress: Progress | None = None
) -> int:
    """Write W + scale · B · A of every matrix that the adapter changes; returns how many.

    The sum is made in fp32 and stored as W is. Nothing is at `out` before all of it is written.
    `progress` hears of tensors done and of all. Raises InvalidRequest if `out` exists,
    BadCheckpoint or Unsupported for what cannot be fused.
    """
    model, out = Path(model), Path(out)
    if out.exists():
        raise InvalidRequest(f"{out} exists.", hint="choose a folder that is not there yet")
    if HFConfig.read(model).quant_method:
        raise Unsupported(
            "an adapter cannot be fused into quantized weights.",
            hint="fuse it into the model in 16 bits, then quantize that",
        )
    tensors = TensorFolder(model)
    try:
        fused = _Fused(tensors, Path(adapter))
        partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            _copy(model, partial)
            fused.write(partial, progress)
            partial.rename(out)
        except OSError as error:
            why = error.strerror or str(error)
            raise KvrunError(f"{out} cannot be written.", cause=why) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        tensors.close()
    return len(fused.changed)


class _Fused:
    """A model's tensors, with an adapter's changes where it has any."""

    def __init__(self, tensors: TensorFolder, adapter: Path) -> None:
        self._tensors = tensors
        _, config = read_config(adapter)
        names = sorted(name for name in tensors.names if name.endswith(".weight"))
        shapes = {name: tensors.find(name)[1].shape for name in names}
        matrices = [name for name, shape in shapes.items() if len(shape) == 2]
        # GPT-2's weights lie as [in, out]; A and B do not.
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._sites = Sites([(self._shard(name, *shapes[name]),) for name in matrices])
        folder = AdapterFolder(adapter, self._sites)
        self._layout = folder.layout
        self._flat, _ = folder.read(torch.float32)
        self.changed = {matrices[site]: site for site, _ in folder.ranks}

    def _shard(self, name: str, rows: int, columns: int) -> Shard:
        out, inner = (columns, rows) if self._transposed else (rows, columns)
        return Shard(name.removesuffix(".weight"), out, inner)

    def write(self, out: Path, progress: Progress | None) -> None:
        """Files of the same names with the same tensors."""
        by_file: dict[TensorFile, list[str]] = {}
        for name in sorted(self._tensors.names):
            by_file.setdefault(self._tensors.find(name)[0], []).append(name)
        done, total = 0, len(self._tensors.names)
        for file, names in by_file.items():
            found = {}
            for name in names:
                found[name] = self._tensor(name, file, self._tensors.find(name)[1])
                done += 1
                if progress:
                    progress(done, total)
            save_file(found, out / file.path.name, {"format": "pt"})

    def _tensor(self, name: str, file: TensorFile, stored: Stored) -> torch.Tensor:
        if stored.dtype not in _DTYPES:
            raise Unsupported(f"{name} is stored as {stored.dtype}, which cannot be fused.")
        tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        flat = tensor.view(-1).view(torch.uint8)
        file.read_into(stored.start, memoryview(flat.numpy().data))
        if name not in self.changed:
            return tensor
        a, b = self._sites.views(self._layout, self._flat, (self.changed[name], 0))
        change = b.t() @ a
        return tensor.copy_(tensor.float() + (change.t() if self._transposed else change))


def _copy(model: Path, out: Path) -> None:
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix in _COPIED:
            shutil.copyfile(path, out / path.name)
