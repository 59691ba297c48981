"""AdapterFolder: a PEFT folder, checked against a model; its matrices as one stretch of memory."""

import json
import math
import os
import re
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvrun.errors import BadCheckpoint, NotFound, Unsupported
from kvrun.runtime.kernels.spread import Target, bits, check_finite
from kvrun.runtime.lora import experts, extras
from kvrun.runtime.lora.pieces import StoredMatrix, lay_in, tensor
from kvrun.runtime.lora.sites import Layout, Place, Sites
from kvrun.runtime.lora.tensors import Parts, by_module
from kvrun.runtime.tensorfile import Stored, TensorFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A rank above this is as large as some matrices are; what a step keeps between A and B grows by it.
LARGEST_RANK = 512
# What says nothing of the finished matrices: names, training, and what they were started from.
_IGNORED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# What shows in the tensors: there is no need to be told.
_SHOWN = {"bias", "use_dora", "lora_bias", "modules_to_save", "target_parameters",
          "trainable_token_indices"}  # fmt: skip
# Every other start changes the base model too, and the file holds only half of the change.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Pair:
    """The change to one matrix: scale · B · A."""

    a: Stored
    b: Stored
    rank: int
    scale: float


class AdapterFolder:
    """What the headers of a PEFT folder say; every tensor in it belongs to a matrix of `sites`.

    Raises NotFound, BadCheckpoint or Unsupported for a folder that cannot be served, with the
    reason.
    """

    def __init__(self, path: str | Path, sites: Sites) -> None:
        self.path = Path(path)
        self._sites = sites
        self._config, config = read_config(self.path)
        self._stamp = _stamp(os.stat(weights_file(self.path)))
        file = TensorFile(weights_file(self.path))
        file.close()
        self._pairs: dict[Place, Pair] = {}
        self._beyond: dict[Place, Parts] = {}
        self._experts: dict[str, experts.Change] = {}
        self._ids: dict[Place, tuple[int, ...]] = {}
        self._header = min((stored.start for stored in file.tensors.values()), default=0)  # bytes
        modules = by_module(file.tensors, self.path)
        check_promises(config, modules, self.path)
        for module, parts in modules.items():
            self._add(module, parts, config)
        self.ranks = {place: pair.rank for place, pair in self._pairs.items()}
        self.ranks |= experts.ranks(sites, self._experts)
        self.layout: Layout = sites.lay_out(self.ranks, self._beyond, self._ids)

    def _add(self, module: str, parts: Parts, config: dict[str, Any]) -> None:
        found = experts.find(self._sites, module, parts, self.path)
        if found is not None:
            count = 1 if found.expert is not None else self._sites.counts[found.place[0]]
            pair = pair_of(module, parts, config, self.path, count)
            change = experts.Change(found, pair.a, pair.b, pair.rank, pair.scale)
            experts.check(self._sites, module, change, self.path)
            self._experts[module] = change
            return
        places = self._sites.find(module)
        if not places:
            raise Unsupported(
                f"the adapter in {self.path} changes {module}, which cannot be served.",
                cause="the model has no product of that name that takes adapters",
            )
        own = None
        if not {"weight", "bias", "tokens", "gain"}.issuperset(parts):
            own = pair_of(module, parts, config, self.path)
        for place in places:
            extras.check(self._sites, place, module, parts, self.path)
            if place in self._pairs or place in self._beyond:
                raise BadCheckpoint(f"the adapter in {self.path} changes {module} twice.")
            if own is not None:
                self._pairs[place] = own
            if kinds := {kind: parts[kind] for kind in extras.KINDS if kind in parts}:
                self._beyond[place] = kinds
            if "tokens" in parts:
                count = parts["tokens"].shape[0]
                self._ids[place] = extras.ids_of(config, module, count, self.path)
                extras.check_ids(self._sites, place, self._ids[place], self.path)

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
        """The matrices, laid out, and a hash of the folder's content.

        Raises BadCheckpoint for values that are not finite, or are no longer so in `dtype`.
        """
        flat = self._room(dtype)
        matrices = self._matrices(flat)
        path = weights_file(self.path)
        try:
            with path.open("rb", buffering=0) as file:
                if _stamp(os.fstat(file.fileno())) == self._stamp:
                    hashes = lay_in(file.fileno(), matrices, dtype, header=self._header)
                    hashes += self._lay_in_rest(file.fileno(), flat)
                    if _stamp(os.fstat(file.fileno())) == self._stamp:
                        together = self._config + b"".join(hashes)
                        return flat, blake2b(together, digest_size=16).hexdigest()
        except EOFError:
            pass
        except OverflowError as error:
            raise BadCheckpoint(
                f"the adapter in {self.path} holds values that are not finite.",
                cause=f"NaN or infinity, in {str(dtype).removeprefix('torch.')}",
            ) from error
        except OSError as error:
            raise BadCheckpoint(f"{path} cannot be read.", cause=error.strerror or "") from error
        raise BadCheckpoint(f"{path} has changed while it was read.", hint="load it again")

    def _matrices(self, flat: torch.Tensor) -> list[StoredMatrix]:
        """All A and B of products, and where they go."""
        matrices: dict[int, StoredMatrix] = {}
        where = bits(flat)
        for place, pair in self._pairs.items():
            shard = self._sites.shard(place)
            a, b = self._sites.views(self.layout, where, place)
            for stored, scale, target in (
                (pair.a, 1.0, Target(a, 1, shard.cols)),
                (pair.b, pair.scale, Target(b, 0, shard.rows)),
            ):
                matrix = matrices.setdefault(stored.start, StoredMatrix(stored, scale))
                matrix.targets.append(target)
        return list(matrices.values())

    def _lay_in_rest(self, file: int, flat: torch.Tensor) -> list[bytes]:
        """Everything else, one tensor at a time; hashes of the bytes."""
        hashes: list[bytes] = []

        def read(stored: Stored) -> torch.Tensor:
            found, hashed = tensor(file, stored)
            hashes.append(hashed)
            return found

        experts.fill(self._sites, self.layout, flat, self._experts, read)
        for place, parts in self._beyond.items():
            if "weight" in parts:
                start = self.layout.extras[place[0]].weights[place[1]]
                matrix = extras.as_kept(self._sites, place, read(parts["weight"]))
                self._sites.weight(flat, start, place).copy_(matrix)
            if "tokens" in parts:
                extra = self.layout.extras[place[0]]
                self._sites.tokens(flat, extra, place[0]).copy_(read(parts["tokens"]))
            vectors = {k: read(s) for k, s in parts.items() if k not in ("weight", "tokens")}
            if "shift" in vectors:
                vectors["shift"] = vectors["shift"].float() * self._pairs[place].scale
            extras.fill(self._sites, self.layout, flat, place, vectors)
        first = self.layout.vectors if self.layout.apart else 0
        for values in (flat[:first], flat[self.layout.vectors :].view(torch.float32)):
            if len(values):
                check_finite(bits(values), values.dtype)
        return hashes

    def _room(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole stretch; where matrices leave gaps between them there are zeros."""
        size = self.layout.size
        filled = sum(r * sum(self._sites.shard(p).shape) for p, r in self.ranks.items())
        # numpy asks the system for large pages, which come in a fifth of the time.
        room = np.empty if filled == size and not self._experts else np.zeros
        return torch.from_numpy(room(size * dtype.itemsize, np.uint8)).view(dtype)


def read_config(path: Path) -> tuple[bytes, dict[str, Any]]:
    """adapter_config.json, once it is clear that nothing in it is beyond A, B and a scale."""
    file = path / CONFIG
    try:
        raw = file.read_bytes()
        config = json.loads(raw)
    except FileNotFoundError as error:
        raise NotFound(f"{path} holds no {CONFIG}.", hint="name the adapter's folder") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{file} cannot be read.", cause=str(error)[:120]) from error
    if not isinstance(config, dict):
        raise BadCheckpoint(f"{file} is not a JSON object.")
    kind = config.get("peft_type")
    if kind != "LORA":
        raise Unsupported(f"the adapter in {path} is of the type {str(kind)[:40]!r}, not LORA.")
    beyond = [key for key, value in config.items() if key not in _IGNORED | _SHOWN and value]
    if beyond:
        said = f"{beyond[0]} = {json.dumps(config[beyond[0]])[:80]}"
        raise Unsupported(f"the adapter in {path} cannot be served.", cause=f"it has {said}")
    if config.get("init_lora_weights") not in _STARTS:
        raise Unsupported(
            f"the adapter in {path} cannot be served.",
            cause=f"its start {config['init_lora_weights']!r} has changed the base model as well",
            hint="save it with path_initial_model_for_weight_conversion",
        )
    return raw, config


def weights_file(path: Path) -> Path:
    """The file with the matrices. Raises NotFound or Unsupported when there is none to be read."""
    file = path / WEIGHTS
    if file.is_file():
        return file
    if (path / "adapter_model.bin").exists():
        raise Unsupported(
            f"{path} holds its matrices as a pickled file, which can run code when it is read.",
            hint="save the adapter as safetensors",
        )
    raise NotFound(f"{path} holds no {WEIGHTS}.")


def embeddings(path: Path) -> set[str]:
    """The last parts of the names of modules that the adapter in `path` changes as embeddings."""
    file = TensorFile(weights_file(path))
    file.close()
    named = [re.split(r"\.(?:lora_embedding_A|token_adapter)", name) for name in file.tensors]
    return {name.rsplit(".", 1)[-1] for name, *more in named if more}


def check_promises(config: dict[str, Any], modules: dict[str, Parts], path: Path) -> None:
    """Raises BadCheckpoint where the file lacks what the configuration says it holds, Unsupported
    for biases of a kind that is not known."""
    if config.get("bias", "none") not in (None, "none", "all", "lora_only"):
        raise Unsupported(f"the adapter in {path} has bias = {str(config['bias'])[:40]!r}.")
    for key, part in (("use_dora", "magnitude"), ("lora_bias", "shift")):
        name = "lora_magnitude_vector" if part == "magnitude" else "lora_B.bias"
        said = bool(config.get(key))
        for module, parts in modules.items():
            if said and "B" in parts and part not in parts:
                raise BadCheckpoint(f"the adapter in {path} lacks {name} of {module}.")
            if part in parts and not said:
                raise BadCheckpoint(
                    f"the adapter in {path} contradicts itself.",
                    cause=f"{module} has {name}, {CONFIG} says {key} = {config.get(key)!r}",
                )
    saved = config.get("modules_to_save") or []
    for name in saved if isinstance(saved, list) else [str(saved)]:
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            raise BadCheckpoint(f"the adapter in {path} lacks the saved module {str(name)[:80]}.")


def pair_of(module: str, parts: Parts, config: dict[str, Any], path: Path, count: int = 1) -> Pair:
    """A, B and scale of a module, or of `count` experts. Raises BadCheckpoint where one is missing
    or contradicted."""
    for side in ("A", "B"):
        if side not in parts:
            raise BadCheckpoint(f"the adapter in {path} lacks lora_{side} of {module}.")
    said = _by_pattern(config, "rank_pattern", module, config.get("r"))
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    rank, left = divmod(parts["A"].shape[0], count)
    if left:
        raise BadCheckpoint(f"{module} of the adapter in {path} is not one of {count} experts.")
    if not isinstance(said, int) or isinstance(said, bool) or said != rank:
        raise BadCheckpoint(
            f"the adapter in {path} contradicts itself.",
            cause=f"{module} has rank {rank}, {CONFIG} says {said!r}",
        )
    if rank > LARGEST_RANK:
        raise Unsupported(f"the adapter in {path} has rank {rank}; {LARGEST_RANK} is the largest.")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise BadCheckpoint(f"{path / CONFIG} says lora_alpha = {str(alpha)[:40]} for {module}.")
    divisor = math.sqrt(rank) if config.get("use_rslora") else rank
    return Pair(parts["A"], parts["B"], rank, alpha / divisor)


def _by_pattern(config: dict[str, Any], key: str, module: str, otherwise: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's name."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise BadCheckpoint(f"{CONFIG} says {key} = {str(patterns)[:60]}.")
    for pattern, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise BadCheckpoint(f"{pattern!r} of {key} is no pattern.", cause=str(error)) from error
    return otherwise


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another one in its place."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
