"""What the tensors of a PEFT file are: of which module, and which part of its change."""

import re
from collections.abc import Mapping
from pathlib import Path

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.lora.pieces import DTYPES
from kvrun.runtime.tensorfile import Stored

# The end of a name, behind the module's -> the part, and its number of dimensions. An adapter's own
# name (".default") may stand in between.
_ENDS = [
    (re.compile(rf"(.+)\.{end}"), part, dimensions)
    for end, part, dimensions in (
        (r"lora_A(?:\.[^.]+)?\.weight", "A", 2),
        (r"lora_B(?:\.[^.]+)?\.weight", "B", 2),
        (r"lora_B(?:\.[^.]+)?\.bias", "shift", 1),
        (r"lora_embedding_A(?:\.[^.]+)?", "A", 2),
        (r"lora_embedding_B(?:\.[^.]+)?", "B", 2),
        (r"lora_magnitude_vector(?:\.[^.]+)?", "magnitude", 1),
        (r"base_layer\.weight", "base", 2),
        (r"base_layer\.bias", "bias", 1),
        (r"token_adapter\.trainable_tokens_delta(?:\.[^.]+)?", "tokens", 2),
        ("weight", "weight", 2),
        ("bias", "bias", 1),
    )
]
_SAVED = re.compile(r"\.modules_to_save\.(?:[^.]+\.)?(?=weight$|bias$)")
Parts = dict[str, Stored]


def by_module(tensors: Mapping[str, Stored], path: Path) -> dict[str, Parts]:
    """Module -> its parts: "A", "B", "shift" (of B's product), "magnitude" (DoRA's), "weight" and
    "bias" in the place of the base's, "base" (the base's own), "tokens" (rows of an embedding),
    "gain" (the weight of a norm).

    Raises Unsupported for a name that is none of these, BadCheckpoint for what no part can be.
    """
    found: dict[str, Parts] = {}
    for name, stored in _once(tensors).items():
        module, part, dimensions = _split(name.removeprefix("base_model.model."), path)
        parts = found.setdefault(module, {})
        if part in parts:
            raise BadCheckpoint(f"the adapter in {path} holds {module} twice.")
        if part == "weight" and len(stored.shape) == 1:
            part, dimensions = "gain", 1
        if len(stored.shape) != dimensions or stored.dtype not in DTYPES or 0 in stored.shape:
            what = "matrix" if dimensions == 2 else "vector"
            raise BadCheckpoint(f"{name} is {stored.dtype} {list(stored.shape)}, not a {what}.")
        parts[part] = stored
    if not found:
        raise BadCheckpoint(f"the adapter in {path} is empty.")
    return found


def _once(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Saved modules under their own names. PEFT writes their biases several times if it is to write
    all biases, those that they replace among them."""
    saved = {name: _SAVED.sub(".", name) for name in tensors if _SAVED.search(name)}
    found = {n: s for n, s in tensors.items() if n not in saved and ".original_module." not in n}
    for name, plain in saved.items():
        found.setdefault(plain, tensors[name])
    return found


def _split(name: str, path: Path) -> tuple[str, str, int]:
    for pattern, part, dimensions in _ENDS:
        if match := pattern.fullmatch(name):
            return match[1], part, dimensions
    raise Unsupported(
        f"the adapter in {path} cannot be served.",
        cause=f"it holds {name}, which is no part of a change to a matrix",
    )
