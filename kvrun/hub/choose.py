"""Which files of a repository a model needs: never code, and pickles only where nothing else is."""

import fnmatch
import json
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvrun.errors import BadCheckpoint, NotFound, Unsupported

SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTER, ADAPTER_BIN = "adapter_model.safetensors", "adapter_model.bin"
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# A snapshot without them is not taken for a model, so they are put in place last.
MANIFESTS = (CONFIG, ADAPTER_CONFIG)

# Beside the weights: tokenizer, template, configurations, what people read.
SMALL = ("*.json", "*.jinja", "*.tiktoken", "*.model", "vocab.txt", "merges.txt",
         "README.md", "LICENSE*", "NOTICE*")  # fmt: skip
NOT_NEEDED = ("*.index.json", "flax_*", "tf_*", "onnx*", "openvino*", "*training*", "trainer_*")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".dill", ".npy", ".npz",
           ".h5", ".msgpack")  # fmt: skip
CODE = (".py", ".pyc", ".so", ".sh", ".exe", ".dll", ".dylib", ".js", ".ipynb", ".whl")


@dataclass(frozen=True)
class Weights:
    """The files of a model's or adapter's weights; `index` lists them where there are several."""

    files: tuple[str, ...]
    index: str | None
    pickled: bool


def check_names(names: Iterable[str]) -> None:
    """Raise BadCheckpoint for a name that could be written outside its folder."""
    for name in names:
        plain = name == posixpath.normpath(name) and not name.startswith(("/", ".."))
        if not plain or "\\" in name or ":" in name or not name.isprintable():
            raise BadCheckpoint(
                f"the repository names a file {name[:80]!r}.",
                cause="such a name could be written outside its folder",
                hint="do not use this repository",
            )


def check_case(names: Iterable[str]) -> None:
    """Raise BadCheckpoint for names that are one where upper and lower case are the same."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(name.casefold(), name)) != name:
            raise BadCheckpoint(
                f"the repository holds '{other}' and '{name}'.",
                cause="where upper and lower case are the same, one would replace the other",
                hint=f"--exclude '{name}'",
            )


def find_index(names: Iterable[str]) -> str | None:
    """The index that must be read before `find_weights` knows the shards."""
    there = set(names)
    if not there & {SAFE, ADAPTER} and SAFE_INDEX in there:
        return SAFE_INDEX
    unsafe = BIN_INDEX in there and not there & {SAFE, ADAPTER, BIN}
    return BIN_INDEX if unsafe else None


def find_weights(repo: str, names: Iterable[str], index: bytes | None) -> Weights:
    """The weights to take: safetensors, else pickles that can be converted.

    `index` is the content of the file `find_index` named. Raises Unsupported for repositories
    with weights of other kinds only, and BadCheckpoint for an index that cannot be right.
    """
    there = set(names)
    named = find_index(there)
    if named is not None and index is not None:
        return Weights(_shards(repo, named, index, there), named, named == BIN_INDEX)
    for name in (SAFE, ADAPTER, BIN, ADAPTER_BIN):
        if name in there:
            return Weights((name,), None, name.endswith(".bin"))
    raise _nothing(repo, there)


def select(
    names: Sequence[str], weights: Weights | None, include: Sequence[str], exclude: Sequence[str]
) -> list[str]:
    """The files to pull: a model's own, or those matching `include`; less `exclude`.

    Code is never taken, and pickles only as far as `weights` names them.
    """
    wanted = set(weights.files) if weights else set()
    if weights and weights.index:
        wanted.add(weights.index)
    chosen = [name for name in names if name in wanted or _is_small(name)]
    if include:
        harmless = [n for n in names if n in wanted or not n.lower().endswith(CODE + PICKLES)]
        chosen = [name for name in harmless if _matches(name, include)]
    chosen = [name for name in chosen if not _matches(name, exclude)]
    if not chosen:
        raise NotFound(
            "no file is left to pull.",
            cause="code and pickled files are never pulled" if include else "",
            hint="--dry-run without --include and --exclude lists the files",
        )
    return sorted(chosen)


def _is_small(name: str) -> bool:
    """Whether a file of the top folder is one that every model may bring."""
    return "/" not in name and _matches(name, SMALL) and not _matches(name, NOT_NEEDED)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(name, pattern + "*" if pattern.endswith("/") else pattern)
        for pattern in patterns
    )


def _shards(repo: str, named: str, index: bytes, there: set[str]) -> tuple[str, ...]:
    try:
        where: Any = json.loads(index)["weight_map"]
        shards = sorted(set(where.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadCheckpoint(f"{named} of '{repo}' cannot be read.", cause=repr(error)) from error
    lost = [shard for shard in shards if shard not in there]
    if lost or not shards:
        raise BadCheckpoint(
            f"'{repo}' is not complete on the Hub.",
            cause=f"{named} names {', '.join(lost[:3]) or 'no files'}",
            hint="another revision may be: kvrun pull ORG/NAME@REV",
        )
    return tuple(shards)


def _nothing(repo: str, there: set[str]) -> Unsupported:
    for ending, what in ((".gguf", "GGUF"), (".safetensors", "safetensors of another name"),
                         (".bin", "pickled files of another name"), (".onnx", "ONNX"),
                         (".msgpack", "Flax"), (".h5", "TensorFlow")):  # fmt: skip
        if any(name.endswith(ending) for name in there):
            hint = "look for the model's repository with model.safetensors"
            return Unsupported(f"'{repo}' holds its weights as {what} only.", hint=hint)
    return Unsupported(
        f"'{repo}' holds no weights.",
        cause=f"its files: {', '.join(sorted(there)[:6]) or 'none'}",
        hint="a model has model.safetensors, an adapter adapter_model.safetensors",
    )
