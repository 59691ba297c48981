"""fuse: a model's folder with an adapter added to its weights, written as a model of its own."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from kvrun.errors import InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.checkpoint import Product, Shard
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.lora.adapter import AdapterFolder, embeddings, read_config
from kvrun.runtime.lora.sites import Sites
from kvrun.runtime.lora.stacks import Stacks
from kvrun.runtime.tensorfile import Stored, TensorFile, TensorFolder, share

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Of a model's folder, beside its weights: configurations, tokenizer, chat template.
_COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken"}
# Matrices that a model with turned ones stores as others do.
_TABLES = ("wte", "wpe", "lm_head")
HEAD = "lm_head.weight"
_SCALED = ("t5",)  # families whose head is another one where it is no embedding
_LAYER = re.compile(r"\.\d+\.")
Progress = Callable[[int, int], None]


def fuse(
    model: str | Path, adapter: str | Path, out: str | Path, progress: Progress | None = None
) -> int:
    """Write W + scale · B · A of every matrix that the adapter changes, with DoRA's magnitudes,
    biases and matrices of its own; returns how many it changes.

    Sums are made in fp32 and stored as W is. Nothing is at `out` before all of it is written.
    `progress` hears of tensors done and of all. Raises InvalidRequest if `out` exists,
    BadCheckpoint or Unsupported for what cannot be fused.
    """
    model, out = Path(model), Path(out)
    if out.exists():
        raise InvalidRequest(f"{out} exists.", hint="choose a folder that is not there yet")
    config = HFConfig.read(model)
    if config.quant_method:
        raise Unsupported(
            "an adapter cannot be fused into quantized weights.",
            hint="fuse it into the model in 16 bits, then quantize that",
        )
    tensors = TensorFolder(model)
    try:
        fused = _Fused(tensors, config, Path(adapter))
        partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
        try:
            partial.mkdir(parents=True)
            _copy(model, partial)
            if fused.untied is not None:
                _untie(partial, fused.untied)
            fused.write(partial, progress)
            partial.rename(out)
        except OSError as error:
            why = error.strerror or str(error)
            raise KvrunError(f"{out} cannot be written.", cause=why) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        tensors.close()
    return fused.count


class _Fused:
    """A model's tensors, with an adapter's changes where it has any."""

    def __init__(self, tensors: TensorFolder, model: HFConfig, adapter: Path) -> None:
        self._tensors = tensors
        _, config = read_config(adapter)
        self._config = model
        self._embeddings = embeddings(adapter)
        shapes = {name: tensors.find(name)[1].shape for name in sorted(tensors.names)}
        matrices = [n for n, shape in shapes.items() if len(shape) == 2 and n.endswith(".weight")]
        # GPT-2's weights lie as [in, out]; A and B do not.
        self._transposed = bool(config.get("fan_in_fan_out"))
        products = [self._product(name, *shapes[name]) for name in matrices]
        self._tied = self._tied_table({name: shapes[name] for name in matrices})
        if self._tied is not None:
            rows, columns = shapes[self._tied]
            products.append(Product((Shard(HEAD.removesuffix(".weight"), rows, columns),)))
            matrices.append(HEAD)
        for name, shape in shapes.items():
            if len(shape) == 1 and name.endswith(".weight"):
                module = name.removesuffix(".weight")
                products.append(Product((Shard(module, shape[0], 1),), "norm"))
                matrices.append(name)
        self._stacks = Stacks(shapes, len(products))
        self._sites = Sites([*products, *self._stacks.products])
        folder = AdapterFolder(adapter, self._sites)
        self._layout = folder.layout
        self._flat, _ = folder.read(torch.float32)
        sites = {site for site, _ in folder.ranks} | set(folder.layout.extras)
        self.changed = {matrices[site]: site for site in sites if site < len(matrices)}
        self.count = len(self.changed) + self._stacks.count(sites)
        self._biases = {}
        for site in folder.layout.extras:
            name = matrices[site].removesuffix("weight") + "bias"
            if name in tensors.names:
                self._biases[name] = site
            elif bool(self._vector(site).any()):
                raise Unsupported(f"the adapter has {name}, for which the model has no place.")
        self._untie = self._tied is not None and self._unties(self._tied)

    def _product(self, name: str, rows: int, columns: int) -> Product:
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in self._embeddings:
            return Product((Shard(module, columns, rows),), "embedding")
        if self._transposed and module.rsplit(".", 1)[-1] not in _TABLES:
            return Product((Shard(module, columns, rows, transposed=True),))
        return Product((Shard(module, rows, columns),))

    def _tied_table(self, shapes: dict[str, tuple[int, ...]]) -> str | None:
        """The one matrix that is embedding and head, if there is such a one."""
        count = self._config.get("vocab_size")
        tables = [n for n, shape in shapes.items() if shape[0] == count and not _LAYER.search(n)]
        return tables[0] if len(tables) == 1 else None

    def _unties(self, table: str) -> bool:
        """Whether embedding and head become two matrices: an adapter changes one of them, or each
        in its own way; rows of single tokens belong to both."""
        extra = self._layout.extras.get(self.changed.get(table, -1))
        if HEAD not in self.changed and (
            table not in self.changed or (extra is not None and extra.tokens is not None)
        ):
            return False
        if self._config.text("model_type") in _SCALED:
            raise Unsupported(
                f"the adapter changes {table}, which the model uses as embedding and head.",
                cause="this family computes otherwise where these are two",
                hint="serve it beside the model",
            )
        return True

    @property
    def untied(self) -> str | None:
        """The embedding from which the head is told apart."""
        return self._tied if self._untie else None

    def _views(self, site: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._sites.views(self._layout, self._flat, (site, 0))

    def _vector(self, site: int) -> torch.Tensor:
        return self._sites.vector(self._flat, self._layout.extras[site].shift, site)

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
            if self._untie and self._tied in found:
                stored = self._tensors.find(self._tied)[1]
                found[HEAD] = self._tensor(self._tied, file, stored, HEAD)
            save_file(found, out / file.path.name, {"format": "pt"})
            share(out / file.path.name)

    def _tensor(
        self, name: str, file: TensorFile, stored: Stored, becomes: str = ""
    ) -> torch.Tensor:
        if stored.dtype not in _DTYPES:
            raise Unsupported(f"{name} is stored as {stored.dtype}, which cannot be fused.")
        tensor = torch.empty(stored.shape, dtype=_DTYPES[stored.dtype])
        flat = tensor.view(-1).view(torch.uint8)
        file.read_into(stored.start, memoryview(flat.numpy().data))
        name = becomes or name
        if name in self._stacks.names:
            self._stacks.add(name, tensor, self._views)
        if name in self._biases:
            return tensor.copy_(self._bias(tensor.float(), self._biases[name]))
        if name not in self.changed:
            return tensor
        site = self.changed[name]
        if self._sites.roles[site] == "norm":
            start = self._layout.extras[site].factor
            if start is not None:
                tensor.copy_(self._sites.vector(self._flat, start, site))
            return tensor
        turned = self._sites.roles[site] == "embedding" or self._sites.shards[site][0].transposed
        found = self._matrix(tensor.t() if turned else tensor, site)
        return tensor.copy_(found.t() if turned else found)

    def _matrix(self, weight: torch.Tensor, site: int) -> torch.Tensor:
        """What becomes of a matrix [out, in]."""
        extra = self._layout.extras.get(site)
        if extra is not None and extra.weights:
            return self._sites.weight(self._flat, extra.weights[0], (site, 0))
        if extra is not None and extra.tokens is not None:
            own = self._sites.tokens(self._flat, extra, site)
            return weight.float().index_copy(1, torch.tensor(extra.ids), own.t())
        a, b = self._views(site)
        changed = weight.float() + b.t() @ a
        if extra is None or extra.factor is None:
            return changed
        magnitude = self._sites.vector(self._flat, extra.factor, site)
        norms: torch.Tensor = torch.linalg.vector_norm(changed, dim=1, keepdim=True)
        return changed * (magnitude.unsqueeze(1) / norms)

    def _bias(self, bias: torch.Tensor, site: int) -> torch.Tensor:
        own = self._vector(site)
        return own if self._layout.extras[site].biases else bias + own


def _copy(model: Path, out: Path) -> None:
    for path in sorted(model.iterdir()):
        if path.is_file() and path.suffix in _COPIED:
            shutil.copyfile(path, out / path.name)


def _untie(out: Path, table: str) -> None:
    """Let configuration and index say that the head has a matrix beside the embedding's."""
    config = out / "config.json"
    values = json.loads(config.read_text())
    for part in (values, values.get("text_config")):
        if isinstance(part, dict):
            part["tie_word_embeddings"] = False
    config.write_text(json.dumps(values, indent=2))
    index = out / "model.safetensors.index.json"
    if index.is_file():
        values = json.loads(index.read_text())
        values["weight_map"][HEAD] = values["weight_map"][table]
        index.write_text(json.dumps(values, indent=2))
