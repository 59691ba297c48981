"""AdapterFolder: a PEFT folder, checked against a model; its matrices as one stretch of memory."""

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvrun.errors import BadCheckpoint, NotFound, Unsupported
from kvrun.runtime.lora.pieces import DTYPES, Matrix, bits, lay_in
from kvrun.runtime.lora.sites import Layout, Place, Sites
from kvrun.runtime.tensorfile import Stored, TensorFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# A rank above this is as large as some matrices are; what a step keeps between A and B grows by it.
LARGEST_RANK = 512
_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight"
)
# What says nothing of the finished matrices: names, training, and what they were started from.
_IGNORED = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout",
    "fan_in_fan_out", "use_rslora", "init_lora_weights", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Every other start changes the base model too, and the file holds only half of the change.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Pair:
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
        self._pairs: dict[Place, _Pair] = {}
        for module, pair in pairs(config, file.tensors, self.path).items():
            self._add(module, pair)
        self.ranks = {place: pair.rank for place, pair in self._pairs.items()}
        self.layout: Layout = sites.lay_out(self.ranks)

    def _add(self, module: str, pair: _Pair) -> None:
        places = self._sites.find(module)
        if not places:
            raise Unsupported(
                f"the adapter in {self.path} changes {module}, which cannot be served.",
                cause="the model has no product of that name that takes adapters",
            )
        for place in places:
            shard = self._sites.shard(place)
            wanted = (pair.rank, shard.in_features), (shard.out_features, pair.rank)
            if (pair.a.shape, pair.b.shape) != wanted:
                raise BadCheckpoint(
                    f"the adapter in {self.path} was made for another model.",
                    cause=f"{module}: A is {list(pair.a.shape)} and B {list(pair.b.shape)}; "
                    f"expected {list(wanted[0])} and {list(wanted[1])}",
                )
            if place in self._pairs:
                raise BadCheckpoint(f"the adapter in {self.path} changes {module} twice.")
            self._pairs[place] = pair

    def read(self, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
        """The matrices, laid out, and a hash of the folder's content.

        Raises BadCheckpoint for values that are not finite, or are no longer so in `dtype`.
        """
        flat = self._room(dtype)
        matrices: dict[int, Matrix] = {}
        where = bits(flat)
        for place, pair in self._pairs.items():
            shard = self._sites.shard(place)
            a, b = self._sites.views(self.layout, where, place)
            for stored, scale, target in (
                (pair.a, 1.0, (a, 1, shard.cols)),
                (pair.b, pair.scale, (b, 0, shard.rows)),
            ):
                matrix = matrices.setdefault(stored.start, Matrix(stored, scale))
                matrix.targets.append(target)
        hashes = self._lay_in(list(matrices.values()), dtype)
        return flat, blake2b(self._config + b"".join(hashes), digest_size=16).hexdigest()

    def _room(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole stretch; where matrices leave gaps between them there are zeros."""
        size = self.layout.size
        filled = sum(r * sum(self._sites.shard(p).shape) for p, r in self.ranks.items())
        # numpy asks the system for large pages, which come in a fifth of the time.
        room = np.empty if filled == size else np.zeros
        return torch.from_numpy(room(size * dtype.itemsize, np.uint8)).view(dtype)

    def _lay_in(self, matrices: list[Matrix], dtype: torch.dtype) -> list[bytes]:
        path = weights_file(self.path)
        try:
            with path.open("rb", buffering=0) as file:
                found = os.fstat(file.fileno())
                if _stamp(found) == self._stamp:
                    hashes = lay_in(file.fileno(), matrices, dtype)
                    if _stamp(os.fstat(file.fileno())) == self._stamp:
                        return hashes
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
    beyond = [
        key
        for key, value in config.items()
        if key not in _IGNORED and value and (key, value) != ("bias", "none")
    ]
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


def pairs(config: dict[str, Any], tensors: Mapping[str, Stored], path: Path) -> dict[str, _Pair]:
    """Module name -> A, B and scale; all tensors are used up."""
    sides: dict[str, dict[str, Stored]] = {}
    for name, stored in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise Unsupported(
                f"the adapter in {path} cannot be served.",
                cause=f"it holds {name}, which is no part A or B of a matrix",
            )
        found = sides.setdefault(match["module"], {})
        if match["side"] in found:
            raise BadCheckpoint(f"the adapter in {path} holds {match['module']} twice.")
        if len(stored.shape) != 2 or stored.dtype not in DTYPES or 0 in stored.shape:
            raise BadCheckpoint(f"{name} is {stored.dtype} {list(stored.shape)}, not a matrix.")
        found[match["side"]] = stored
    if not sides:
        raise BadCheckpoint(f"the adapter in {path} is empty.")
    return {module: _pair(module, found, config, path) for module, found in sides.items()}


def _pair(module: str, sides: dict[str, Stored], config: dict[str, Any], path: Path) -> _Pair:
    if len(sides) < 2:
        lost = "B" if "A" in sides else "A"
        raise BadCheckpoint(f"the adapter in {path} lacks lora_{lost} of {module}.")
    said = _by_pattern(config, "rank_pattern", module, config.get("r"))
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    rank = sides["A"].shape[0]
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
    return _Pair(sides["A"], sides["B"], rank, alpha / divisor)


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
