"""HFConfig: a model's config.json, as it was written, read with checks."""

import json
from pathlib import Path
from typing import Any

from kvrun.errors import BadCheckpoint, NotFound, Unsupported

_MISSING: Any = object()
# Names under which configurations have said the same thing.
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of old checkpoints
_ROPE_SCALED = ("llama3", "yarn", "longrope")


class HFConfig:
    """The raw values of a config.json; those of `text_config`, where there is one, come first.

    `config.name` gives a required value as it stands; the typed getters check it. A JSON null
    counts as absent. Raises NotFound without the file and BadCheckpoint for a damaged one.
    """

    def __init__(self, values: dict[str, Any], source: str = "config.json") -> None:
        text = values.get("text_config")
        self._values = {**values, **text} if isinstance(text, dict) else dict(values)
        self._source = source
        if not isinstance(self._values.get("model_type"), str):
            raise self._wrong("model_type", "a string that names the architecture")

    @classmethod
    def read(cls, folder: str | Path) -> "HFConfig":
        path = Path(folder) / "config.json"
        values = _object(path)
        if values is None:
            raise NotFound(
                f"{path.parent} holds no config.json.",
                hint="give a folder with a model in Hugging Face format",
            )
        for name, method in _BESIDE.items():
            found = _object(path.with_name(name)) if "quantization_config" not in values else None
            if found is not None:
                values["quantization_config"] = {"quant_method": method, **found}
        return cls(values, str(path))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self.get(name, _MISSING)

    def get(self, name: str, default: Any = None) -> Any:
        value = self._values.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise BadCheckpoint(f"{self._source} does not say '{name}'.")
        return default

    def integer(self, name: str, default: int = _MISSING) -> int:
        """A whole number of at least 1."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, "a whole number of at least 1")
        return value

    def number(self, name: str, default: float = _MISSING) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise self._wrong(name, "a number")
        return float(value)

    def optional(self, name: str, default: float) -> float | None:
        """A finite number; unlike elsewhere a JSON null says that there is none."""
        if name in self._values and self._values[name] is None:
            return None
        return self.number(name, default)

    def refuse(self, name: str, value: object) -> None:
        """Raise Unsupported if `name` has this `value`, which kvrun would not honour."""
        if self.get(name) == value:
            raise Unsupported(f"{self._source}: '{name}': {json.dumps(value)} is not supported.")

    def flag(self, name: str, default: bool = _MISSING) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false")
        return value

    def text(self, name: str, default: str = _MISSING) -> str:
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self._wrong(name, "a string")
        return value

    def layer_types(self, default: list[str]) -> list[str]:
        """What kind of attention each layer has, in the words of `layer_types`."""
        value = self.get("layer_types", default)
        known = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not known or len(value) < self.integer("num_hidden_layers"):
            raise self._wrong("layer_types", "a list with a name for every layer")
        return list(value)

    @property
    def dtype(self) -> str | None:
        """The dtype the weights were saved in ("bfloat16", ...), or None when it is not said."""
        value = self.get("dtype", self.get("torch_dtype"))
        return value.removeprefix("torch.") if isinstance(value, str) else None

    @property
    def quant_method(self) -> str | None:
        """How matrices are stored, or None for plain ones."""
        value = self.get("quantization_config")
        if value is None:
            return None
        method = value.get("quant_method") if isinstance(value, dict) else None
        if not isinstance(method, str):
            raise self._wrong("quantization_config", "an object that names its quant_method")
        return method

    def quantization(self) -> "HFConfig":
        """What `quantization_config` says; nothing where there is none."""
        found = self.get("quantization_config", {})
        values = dict(found) if isinstance(found, dict) else {}
        values["model_type"] = "quantization"
        return HFConfig(values, f"{self._source}: quantization_config")

    def rope(self, layer_type: str | None = None) -> "HFConfig":
        """The rotary parameters, in one form: `rope_type`, `rope_theta` and what the type needs.

        Accepts `rope_theta` beside `rope_scaling`, and `rope_parameters`, which may be nested by
        layer type.
        """
        found = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(found, dict):
            raise self._wrong("rope_parameters", "an object")
        if layer_type is not None and isinstance(found.get(layer_type), dict):
            found = found[layer_type]
        values = {key: value for key, value in found.items() if value is not None}
        values.setdefault("rope_type", values.get("type", "default"))
        values.setdefault("rope_theta", self.number("rope_theta", 10000.0))
        values.setdefault("partial_rotary_factor", self.number("partial_rotary_factor", 1.0))
        if values["rope_type"] in _ROPE_SCALED:
            trained = self.get("original_max_position_embeddings")
            if trained is None:
                trained = values.get("original_max_position_embeddings")
            if trained is None:
                trained = self.get("max_position_embeddings", _MISSING)
            values["original_max_position_embeddings"] = trained
        values["model_type"] = "rope"
        return HFConfig(values, f"{self._source}: rope_parameters")

    def _wrong(self, name: str, expected: str) -> BadCheckpoint:
        value = self._values.get(name)
        said = "says nothing" if value is None else f"says {json.dumps(value)[:80]}"
        return BadCheckpoint(f"{self._source}: '{name}' must be {expected}.", cause=f"it {said}")


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is no such file."""
    try:
        raw = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise BadCheckpoint(f"{path} cannot be read.", cause=str(error)) from error
    try:
        values = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not JSON.", cause=str(error)) from error
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{path} is not a JSON object.")
    return values


def _finite(value: float) -> bool:
    return abs(value) < 1e300
