"""HFConfig: a model's config.json, as it was written, read with checks."""

import json
from pathlib import Path
from typing import Any

from kvrun.errors import BadCheckpoint, NotFound, Unsupported

_MISSING: Any = object()
_INFINITY = {"__float__": "Infinity"}
_ROPE_SCALED = ("llama3", "yarn", "longrope", "su")
# What a value is called in the configurations of some families, by its usual name.
_ALIASES = {
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_decoder_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "model_max_length", "seq_length"),
    "num_kv_heads": ("n_head_kv",),
    "layer_types": ("layers_block_type",),
    "head_dim": ("d_kv",),
    "intermediate_size": ("d_ff",),
    "num_experts": ("num_local_experts",),
    "num_local_experts": ("num_experts",),
    "n_routed_experts": ("num_local_experts", "num_experts"),
}
# What families were called before transformers took them in.
_FORMER_NAMES = {"RefinedWeb": "falcon", "RefinedWebModel": "falcon"}
_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of old checkpoints


class HFConfig:
    """The raw values of a config.json; those of `text_config`, where there is one, come first.

    `config.name` gives a required value as it stands; the typed getters check it. A JSON null
    counts as absent. `context` is the length that an engine is limited to, where it is. Raises
    NotFound without the file and BadCheckpoint for a damaged one.
    """

    def __init__(self, values: dict[str, Any], source: str = "config.json") -> None:
        text = values.get("text_config")
        self._values = {**values, **text} if isinstance(text, dict) else dict(values)
        # What the whole of text part and towers is called.
        several = any(
            isinstance(values.get(part), dict) for part in ("text_config", "vision_config")
        )
        whole = values.get("model_type") if several else None
        self.whole: str | None = whole if isinstance(whole, str) else None
        self._source = source
        self.context: int | None = None
        if "model_type" not in self._values and isinstance(values.get("ssm_cfg"), dict):
            # The authors of Mamba name no type.
            second = values["ssm_cfg"].get("layer") == "Mamba2"
            self._values["model_type"] = "mamba2" if second else "mamba"
        if not isinstance(self._values.get("model_type"), str):
            raise self._wrong("model_type", "a string that names the architecture")
        kind = self._values["model_type"]
        self._values["model_type"] = _FORMER_NAMES.get(kind, kind)

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
        for said in (name, *_ALIASES.get(name, ())):
            value = self._values.get(said)
            if value is not None:
                return value
        if default is _MISSING:
            raise BadCheckpoint(f"{self._source} does not say '{name}'.")
        return default

    def defaults(self, **values: Any) -> None:
        """What counts where nothing is said: files leave out what a family calls usual."""
        self._values |= {name: v for name, v in values.items() if self.get(name) is None}

    def replace(self, **values: Any) -> None:
        """What counts whatever is said: files of another format, read as the usual one."""
        self._values |= values

    def integer(self, name: str, default: int = _MISSING) -> int:
        """A whole number of at least 1."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self._wrong(name, "a whole number of at least 1")
        return value

    def integer_or_none(self, name: str) -> int | None:
        return None if self.get(name) is None else self.integer(name)

    def number_or_none(self, name: str) -> float | None:
        return None if self.get(name) is None else self.number(name)

    def count(self, name: str, default: int = _MISSING) -> int:
        """A whole number of at least 0."""
        return 0 if self.get(name, default) == 0 else self.integer(name, default)

    def indices(self, name: str, default: list[int], least: int = 0) -> list[int]:
        """A list of at least so many whole numbers, or of ones and zeros."""
        value = self.get(name, default)
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            raise self._wrong(name, "a list of whole numbers")
        if len(value) < least:
            raise self._wrong(name, f"a list of at least {least} whole numbers")
        return value

    def number(self, name: str, default: float = _MISSING) -> float:
        """A finite number."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise self._wrong(name, "a number")
        return float(value)

    def numbers(self, name: str, count: int) -> list[float]:
        """A list of so many finite numbers."""
        value = self.get(name, _MISSING)
        listed = isinstance(value, list) and len(value) == count
        if not listed or not all(isinstance(v, int | float) and _finite(v) for v in value):
            raise self._wrong(name, f"a list of {count} numbers")
        return [float(v) for v in value]

    def limits(self, name: str) -> tuple[float, float]:
        """A least and a greatest number, which may be infinite; nothing said: 0 and infinity."""
        value = self.get(name, [0.0, float("inf")])
        # transformers writes {"__float__": "Infinity"} for what JSON has no number for.
        listed = value if isinstance(value, list) else []
        found = [float("inf") if v == _INFINITY else v for v in listed]
        if len(found) != 2 or not all(isinstance(v, int | float) for v in found):
            raise self._wrong(name, "a list of two numbers")
        return float(found[0]), float(found[1])

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

    def part(self, name: str) -> "HFConfig":
        """The object that is the value of `name`; an empty one where there is none."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return HFConfig({**value, "model_type": name}, f"{self._source}: {name}")

    def layer_types(self, default: list[str], known: tuple[str, ...] = ()) -> list[str]:
        """What kind of attention each layer has, in the words of `layer_types`.

        Raises Unsupported for another kind than the `known` ones, where these are given.
        """
        value = self.get("layer_types", default)
        named = isinstance(value, list) and all(isinstance(v, str) for v in value)
        if not named or len(value) < self.integer("num_hidden_layers"):
            raise self._wrong("layer_types", "a list with a name for every layer")
        if other := [kind for kind in value if known and kind not in known]:
            raise Unsupported(f"{self._source}: a layer of the kind '{other[0]}' is not supported.")
        return list(value)

    def window(self, layer: int, *, every: int = 0, size: int = 4096) -> int | None:
        """The window of a layer, or None for one that sees everything.

        Where `layer_types` is not said, each layer has a window but every so many-th. Where
        `sliding_window` is not said it is `size`; a null says that there is none.
        """
        count = self.integer("num_hidden_layers")
        full = [every and (n + 1) % every == 0 for n in range(count)]
        kinds = self.layer_types(["full_attention" if f else "sliding_attention" for f in full])
        if kinds[layer] != "sliding_attention" or self.optional("sliding_window", size) is None:
            return None
        return self.integer("sliding_window", size)

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

    def rope(
        self,
        layer_type: str | None = None,
        *,
        theta: float = 10000.0,
        partial: float = 1.0,
        scaled: bool = True,
    ) -> "HFConfig":
        """The rotary parameters, in one form: `rope_type`, `rope_theta` and what the type needs.

        Accepts `rope_theta` beside `rope_scaling`, and `rope_parameters`, which may be nested by
        layer type. `theta` and `partial` hold where nothing is said. With `scaled=False` only what
        stands under the layer type counts, else `theta` and no scaling.
        """
        found = self.get("rope_parameters", self.get("rope_scaling", {}))
        if not isinstance(found, dict):
            raise self._wrong("rope_parameters", "an object")
        if layer_type is not None and isinstance(found.get(layer_type), dict):
            found = found[layer_type]
        elif not scaled:
            found = {"rope_theta": theta}
        values = {key: value for key, value in found.items() if value is not None}
        values.setdefault("rope_type", values.get("type", "default"))
        values.setdefault("rope_theta", self.number("rope_theta", theta))
        said = self.number("partial_rotary_factor", partial)
        values.setdefault("partial_rotary_factor", said)
        longest = self.get("max_position_embeddings")
        if longest is not None:
            values.setdefault("max_position_embeddings", longest)
        if values["rope_type"] in _ROPE_SCALED:
            trained = self.get("original_max_position_embeddings")
            if trained is None:
                trained = values.get("original_max_position_embeddings")
            if trained is None:
                trained = self.get("max_position_embeddings", _MISSING)
            values["original_max_position_embeddings"] = trained
        values["model_type"] = "rope"
        values["context"] = self.context
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
