"""Quantize a model: layer by layer from its files into a new folder, which appears when it is done.

Until then everything lies in OUT.partial: a file for each finished layer, with which a job that
was interrupted goes on.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kvrun import __version__
from kvrun.errors import InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.batch import Batch
from kvrun.runtime.calibrate import store
from kvrun.runtime.calibrate.layer import LIKE_LLAMA, Made, Way
from kvrun.runtime.calibrate.layers import Layers
from kvrun.runtime.config import METHODS
from kvrun.runtime.engine.start import choose_device, choose_dtype
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.plan import size
from kvrun.runtime.quant import _round
from kvrun.runtime.tensorfile import INDEX, TensorFolder, share

PARTIAL = ".partial"
RECIPE, PLAN = "recipe.json", "plan.json"
# What belongs to a model beside its weights and config.json.
BESIDE = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
          "*.model", "chat_template*", "generation_config.json", "LICENSE*")  # fmt: skip
Progress = Callable[[int, int, str], None]  # layers done, of how many, what is done now
_SMALL = 256 << 20  # tensors up to so many bytes share a file


@dataclass(frozen=True)
class Recipe:
    """What to do; `group_size` None: 128 columns share a scale of 4 bits, a row one of 8; `format`
    of store.FORMATS, None: the method's usual."""

    model: str
    method: str
    group_size: int | None = None
    calibration: str = "builtin"
    samples: int = 128
    sample_length: int = 512
    format: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InvalidRequest(
                f"--method is '{self.method}'.", hint=f"one of: {', '.join(METHODS)}"
            )
        if self.form not in store.FORMATS:
            raise InvalidRequest(
                f"--format is '{self.form}'.", hint=f"one of: {', '.join(store.FORMATS)}"
            )
        if self.method not in (known := store.FORMATS[self.form]):
            raise InvalidRequest(
                f"files of {self.form} do not hold what --method {self.method} makes.",
                hint=f"with --format {self.form}: {', '.join(known)}",
            )
        fixed = self.method in ("nf4", "fp8") or self.form == "bitsandbytes"
        if self.group_size is not None and (fixed or self.group_size < 32 or self.group_size % 32):
            why = f"{self.method} has no choice of it" if fixed else "it is a multiple of 32"
            raise InvalidRequest(f"--group-size is {self.group_size}.", hint=why)

    @property
    def form(self) -> str:
        return self.format or store.usual(self.method)

    @property
    def looks(self) -> bool:
        """Whether the method needs text."""
        return self.method in store.CALIBRATED

    @property
    def group(self) -> int | None:
        return self.group_size or (_round.GROUP if store.BITS.get(self.method) == 4 else None)


def quantize(
    folder: Path,
    out: Path,
    recipe: Recipe,
    prompts: Sequence[Sequence[int]],
    *,
    device: str = "auto",
    progress: Progress = lambda done, total, what: None,
) -> None:
    """Write the model of `folder`, quantized, to the new folder `out`.

    `prompts`: token ids for methods that look at text. Raises KvrunError; what was in `out` or
    `folder` stays untouched.
    """
    config = HFConfig.read(folder)
    if config.quant_method:
        raise Unsupported(
            f"the model is quantized already, as '{config.quant_method}'.",
            hint="name the model in 16 or 32 bits",
        )
    if out.exists():
        raise InvalidRequest(f"{out} is there already.", hint="name a new folder, or remove it")
    place = choose_device(device)
    partial = out.with_name(out.name + PARTIAL)
    dtype = choose_dtype("auto", config.dtype, place)
    with torch.inference_mode(), Layers(folder, place, dtype) as layers:
        job = _Job(layers, recipe, folder, partial, progress)
        try:
            with ThreadPoolExecutor(1) as writer:
                job.run(prompts, writer)
            partial.rename(out)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise KvrunError(
                f"the quantized model cannot be written to {out}.",
                cause=getattr(error, "strerror", None) or str(error),
                hint="free some space, or name another folder",
            ) from error


class _Job:
    def __init__(
        self, layers: Layers, recipe: Recipe, folder: Path, partial: Path, progress: Progress
    ) -> None:
        self._layers = layers
        self._recipe = recipe
        self._folder = folder
        self._partial = partial
        self._progress = progress
        self._stored = TensorFolder(folder)
        self._stored.close()
        config = layers.files.config
        self._way = Way(recipe.method, recipe.group, _dtype(config), recipe.form)
        self._family = config.text("model_type")
        # Matrices that become codes: their layer and shape.
        self._matrices = {
            shard.name: (lazy.layer, (shard.out_features, shard.in_features))
            for lazy in layers.lazy
            for shard in lazy.shards
            if lazy.layer >= 0 and not _round.stays(shard)
        }
        for name, (_, shape) in self._matrices.items():
            self._check(name, shape)

    def _check(self, name: str, shape: tuple[int, int]) -> None:
        full, (n, k) = f"{name}.weight", shape
        if full not in self._stored or self._stored.find(full)[1].shape != shape:
            raise Unsupported(
                f"a model of the family '{self._family}' is not quantized into a folder.",
                cause=f"{full} is not stored as [{n}, {k}]",
                hint="quantize it as it is read: --quantize of chat and serve",
            )
        group = self._way.group
        if group is not None and k % group:
            raise InvalidRequest(
                f"groups of {group} columns do not divide the {k} columns of {name}.",
                hint=f"--group-size {_round.fitting(k, group)}",
            )
        units = store.unit(self._recipe.form, store.BITS.get(self._recipe.method, 8))
        if n % units[0] or k % units[1]:
            raise InvalidRequest(
                f"words of {self._recipe.form} do not divide {name} of [{n}, {k}].",
                hint=f"--format {store.usual(self._recipe.method)}",
            )
        if self._recipe.method == "nf4" and n * k % _round.BLOCK:
            raise InvalidRequest(f"blocks of {_round.BLOCK} do not divide {name} of [{n}, {k}].")

    def run(self, prompts: Sequence[Sequence[int]], writer: ThreadPoolExecutor) -> None:
        """A layer is read ahead, and the one before is written, while one is worked on."""
        layers, total, looks = self._layers, len(self._layers.model.blocks), self._recipe.looks
        self._prepare()
        batches = layers.batches(prompts) if looks else []
        states = layers.embed(batches)
        written: Future[None] | None = None
        for n in range(total):
            self._progress(n, total, f"layer {n + 1} of {total}")
            if self._file(n).exists():
                values = self._finished(n) if looks else {}
            else:
                self._ahead(n + 1)
                made = self._layer(n, states, batches)
                values = made.values
                if written is not None:
                    written.result()
                written = writer.submit(self._write, n, made)
            if looks:
                for lazy in layers.of(n):
                    if all(shard.name in values for shard in lazy.shards):
                        lazy.put(values)
                states = layers.run(n, states, batches)
            layers.drop(n)
        self._progress(total, total, "what stays as it is")
        if written is not None:
            written.result()
        self._finish(total)

    def _ahead(self, layer: int) -> None:
        """Have the system read a layer's files in the background."""
        for name in self._names(layer) if hasattr(os, "posix_fadvise") else ():
            file, stored = self._stored.find(f"{name}.weight")
            with file.path.open("rb") as opened:
                place = opened.fileno(), stored.start, stored.nbytes
                os.posix_fadvise(*place, os.POSIX_FADV_WILLNEED)

    def _prepare(self) -> None:
        """An empty folder, or one in which the same job was interrupted."""
        files = [(p.name, p.stat().st_size) for p in sorted(self._folder.glob("*.safetensors"))]
        plan = json.loads(json.dumps({**asdict(self._recipe), "files": files}))
        path = self._partial / PLAN
        if path.is_file() and json.loads(path.read_text()) == plan:
            return
        shutil.rmtree(self._partial, ignore_errors=True)
        width = 0.58 if self._recipe.method == "nf4" or self._way.group else 1.05
        needed = sum(int(n * k * width) for _, (n, k) in self._matrices.values())
        needed += sum(self._stored.find(name)[1].nbytes for name in self._plain())
        self._partial.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._partial.parent).free
        if needed > free:
            raise KvrunError(
                f"the quantized model needs {size(needed)}, {size(free)} are free.",
                cause=str(self._partial.parent),
                hint="free some space, or name another folder",
            )
        self._partial.mkdir()
        path.write_text(json.dumps(plan))

    def _plain(self) -> list[str]:
        """The tensors that stay as they are."""
        return sorted(
            n for n in self._stored.names if n.removesuffix(".weight") not in self._matrices
        )

    def _file(self, layer: int) -> Path:
        return self._partial / f"layer-{layer:05}.safetensors"

    def _factors(self, layer: int) -> Path:
        return self._partial / f"factors-{layer:05}"

    def _names(self, layer: int) -> list[str]:
        return [name for name, (at, _) in self._matrices.items() if at == layer]

    def _finished(self, layer: int) -> dict[str, torch.Tensor]:
        """The values that an earlier run has written for a layer."""
        device = str(self._layers.files.device)
        made, found = Made(), load_file(self._file(layer), device)
        for full, factor in load_file(self._factors(layer), device).items():
            name, _, kind = full.rpartition(".")
            (made.columns if kind == "columns" else made.rows)[name] = factor
        for name in self._names(layer):
            own = {f[len(name) + 1 :]: t for f, t in found.items() if f.startswith(f"{name}.")}
            values = store.values_of(own, store.BITS[self._recipe.method], self._recipe.form)
            made.add(name, own, values)
        return made.values

    def _layer(self, n: int, states: Sequence[torch.Tensor], batches: Sequence[Batch]) -> Made:
        layers, files = self._layers, self._layers.files
        if batches:
            layers.watch(n, states, batches)
        weights = {name: self._wide(name) for name in self._names(n)}
        norms = {}
        if self._recipe.method == "awq" and self._family in LIKE_LLAMA:
            here = {name.rsplit(".", 2)[0] for name in weights}
            found = [name for name in self._plain() if name.rsplit(".", 2)[0] in here]
            shapes = {name: self._stored.find(name)[1].shape for name in found}
            norms = {
                name: files.read(name, shape, None, torch.float32)
                for name, shape in shapes.items()
                if len(shape) == 1
            }
        return self._way.make(weights, layers.of(n), norms)

    def _wide(self, name: str) -> torch.Tensor:
        """A matrix in fp32, which it becomes on the device."""
        full, shape = f"{name}.weight", self._matrices[name][1]
        _, dtype = self._layers.files.find(full, shape, torch.float32)
        return self._layers.files.read(full, shape, None, dtype).float()

    def _write(self, n: int, made: Made) -> None:
        factors = {f"{name}.columns": t.clone() for name, t in made.columns.items()}
        factors |= {f"{name}.rows": t for name, t in made.rows.items()}
        _save(factors, self._factors(n))
        _save(made.tensors, self._file(n))

    def _finish(self, total: int) -> None:
        """Everything else, and the names that a finished model has."""
        parts = [self._file(n) for n in range(total)]
        done = {name for path in parts for name in _names_in(path)}
        parts += self._copy([name for name in self._plain() if name not in done])
        where: dict[str, str] = {}
        all_bytes = 0
        for i, path in enumerate(parts, start=1):
            final = f"model-{i:05}-of-{len(parts):05}.safetensors"
            where |= dict.fromkeys(_names_in(path), final)
            all_bytes += path.stat().st_size
            path.rename(self._partial / final)
        index = {"metadata": {"total_size": all_bytes}, "weight_map": where}
        _write(self._partial / INDEX, index)
        config = json.loads((self._folder / "config.json").read_text())
        plain = [
            name.removesuffix(".weight")
            for name in self._plain()
            if name.endswith(".weight") and len(self._stored.find(name)[1].shape) == 2
        ]
        ignore = sorted({"lm_head", *plain})
        form = self._recipe.form
        said = store.configuration(self._recipe.method, form, self._way.group, ignore)
        if form == "gptq":  # readers of old files look here
            _write(self._partial / "quantize_config.json", said)
        _write(self._partial / "config.json", {**config, "quantization_config": said})
        versions = {"kvrun": __version__, "torch": torch.__version__}
        _write(self._partial / RECIPE, {**asdict(self._recipe), "versions": versions})
        for path in {path for pattern in BESIDE for path in self._folder.glob(pattern)}:
            if path.is_file():
                shutil.copyfile(path, self._partial / path.name)
        for path in [self._partial / PLAN, *map(self._factors, range(total))]:
            path.unlink()

    def _copy(self, names: Sequence[str]) -> list[Path]:
        """Tensors that stay as they are; large ones get a file of their own."""
        held: dict[str, torch.Tensor] = {}
        paths: list[Path] = []

        def store_held() -> None:
            if held:
                paths.append(self._partial / f"plain-{len(paths):05}.safetensors")
                _save(held, paths[-1])
                held.clear()

        for name in names:
            file, stored = self._stored.find(name)
            if sum(t.nbytes for t in held.values()) + stored.nbytes > _SMALL:
                store_held()
            with safe_open(file.path, "pt") as opened:
                held[name] = opened.get_tensor(name)
        store_held()
        return paths


def _dtype(config: HFConfig) -> torch.dtype:
    """The dtype a model was saved in, which its scales get too."""
    return choose_dtype(config.dtype or "float32", None, torch.device("cpu"))


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """All of a file or nothing."""
    beside = path.with_name(path.name + ".new")
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    save_file(kept, beside, metadata={"format": "pt"})
    share(beside)
    beside.rename(path)


def _names_in(path: Path) -> list[str]:
    with safe_open(path, "pt") as opened:
        return list(opened.keys())


def _write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
