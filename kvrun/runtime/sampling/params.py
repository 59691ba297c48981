"""SamplingParams: what one request asks of the sampler; every field with its bounds and help."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kvrun.errors import InvalidRequest

INT_MAX = 2**31 - 1
GREEDY_BELOW = 1e-5  # dividing by less would overflow fp32, and the draw is the maximum anyway
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_STOP_IDS = 128
MAX_BIASES = 1024

KINDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "texts": "text, or a list of texts",
    "ids": "a list of token ids",
    "biases": "a map from token ids to numbers",
}
# How values of a kind are typed, where that is no matter of course.
WRITTEN = {"texts": 'one text, or ["a", "b"]', "ids": "1,2,3", "biases": "5:-100,7:2.5"}


class Bounds(NamedTuple):
    """An interval; `above` says that `low` itself is outside."""

    low: float
    high: float
    above: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        return (value > self.low if self.above else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        first = f"above {self.low:g}, " if self.above else f"at least {_plain(self.low)}, "
        return f"{first}at most {_plain(self.high)}"


class Option(NamedTuple):
    """One field as a command line, an API body or a form needs it; `type` is a key of KINDS."""

    name: str
    type: str
    default: Any
    bounds: Bounds | None
    help: str
    optional: bool  # None is a value of its own


def _option(
    default: Any,
    kind: str,
    help: str,
    low: float | None = None,
    high: float | None = None,
    *,
    above: bool = False,
) -> Any:
    bounds = None if low is None or high is None else Bounds(low, high, above)
    return dataclasses.field(
        default=default, metadata={"type": kind, "bounds": bounds, "help": help}
    )


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks of the sampler. `temperature=0` is greedy.

    Options act in the order of the rows in `sampling.sampler`. Raises InvalidRequest with the
    field, its value and its bounds. `stop` takes one text or a list; all sequences end as tuples.
    """

    max_tokens: int | None = _option(
        None, "int", "most tokens to generate; none: as many as fit", 1, INT_MAX
    )
    temperature: float = _option(
        1.0, "float", "flattens the distribution when higher; 0 is greedy", 0, 100
    )
    top_k: int = _option(0, "int", "keep the k likeliest tokens; 0 is off", 0, INT_MAX)
    top_p: float = _option(
        1.0, "float", "keep the likeliest tokens that hold this mass", 0, 1, above=True
    )
    min_p: float = _option(
        0.0, "float", "drop tokens less likely than this share of the likeliest", 0, 1
    )
    typical_p: float = _option(
        1.0, "float", "keep the tokens of most typical surprise with this mass", 0, 1, above=True
    )
    repetition_penalty: float = _option(
        1.0, "float", "divides scores of tokens seen in prompt and output", 0.01, 100
    )
    presence_penalty: float = _option(
        0.0, "float", "subtracted once from tokens seen in the output", -2, 2
    )
    frequency_penalty: float = _option(
        0.0, "float", "subtracted per occurrence of a token in the output", -2, 2
    )
    seed: int | None = _option(
        None,
        "int",
        "same seed, same draws; none: the engine chooses one for each request",
        -(2**63),
        2**64 - 1,
    )
    stop: tuple[str, ...] = _option(
        (), "texts", f"end before one of these texts (at most {MAX_STOPS})"
    )
    stop_token_ids: tuple[int, ...] = _option((), "ids", "end after one of these token ids")
    ignore_eos: bool = _option(False, "bool", "go on after the model's end-of-text token")
    min_tokens: int = _option(0, "int", "no end-of-text or stop token before this many", 0, INT_MAX)
    n: int = _option(1, "int", "answers to the same prompt", 1, 128)
    logprobs: int | None = _option(
        None, "int", "report log-probabilities, and those of this many likeliest tokens", 0, 20
    )
    prompt_logprobs: int | None = _option(
        None, "int", "report log-probabilities of the prompt too, with this many likeliest", 0, 20
    )
    logit_bias: dict[int, float] | None = _option(  # noqa: RUF009 (the default is None)
        None, "biases", "added to the scores of token ids, from -100 to 100 each"
    )

    def __post_init__(self) -> None:
        for option in self.options():
            value = getattr(self, option.name)
            if value is None and option.optional:
                continue
            object.__setattr__(self, option.name, _checked(option, value))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, "
                f"which is {self.max_tokens}."
            )

    @property
    def greedy(self) -> bool:
        """Whether every draw is the token with the highest score."""
        return self.temperature < GREEDY_BELOW

    @property
    def needs_history(self) -> bool:
        """Whether a draw depends on all former tokens, so that it has to wait for them."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    @property
    def plain(self) -> bool:
        """Whether a draw depends on nothing but logits, temperature and noise."""
        cut = self.top_k or self.top_p < 1 or self.min_p or self.typical_p < 1
        asks = self.logit_bias or self.min_tokens or self.logprobs is not None
        return not (self.needs_history or asks or (cut and not self.greedy))

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise InvalidRequest when an option names a token id that the model does not have."""
        for name in ("logit_bias", "stop_token_ids"):
            for token in getattr(self, name) or ():
                if token >= vocab_size:
                    raise InvalidRequest(
                        f"{name} names token {token}; the model has ids 0 to {vocab_size - 1}."
                    )

    @classmethod
    def options(cls) -> list[Option]:
        """Every field, in the order of the class."""
        return _OPTIONS

    @classmethod
    def from_strings(
        cls, values: Mapping[str, str], base: "SamplingParams | None" = None
    ) -> "SamplingParams":
        """`base` (or the defaults) with options given as texts: {"temperature": "0.7"}."""
        parsed = {find(name).name: parse(name, text) for name, text in values.items()}
        return dataclasses.replace(base if base is not None else cls(), **parsed)


_OPTIONS = [
    Option(
        f.name,
        f.metadata["type"],
        f.default,
        f.metadata["bounds"],
        f.metadata["help"],
        f.default is None,
    )
    for f in dataclasses.fields(SamplingParams)
]
_BY_NAME = {option.name: option for option in _OPTIONS}
_BIAS = Bounds(-100, 100)
_TOKEN_ID = Bounds(0, INT_MAX)


def parse_option(text: str) -> tuple[str, Any]:
    """The field and value of "temperature=0.7". See `parse` for how values are written."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidRequest(f"'{text}' is no option.", hint="write it as NAME=VALUE")
    return find(name.strip()).name, parse(name.strip(), value)


def parse(name: str, text: str) -> Any:
    """The checked value of option `name` (dashes may stand for underscores) written as `text`.

    `stop` is one text, or a JSON list of them; ids are written 1,2,3; biases 5:-100,7:2.5; "none"
    unsets an option that may be unset.
    """
    option = find(name)
    stripped = text.strip()
    if option.optional and stripped.lower() in {"none", "null"}:
        return None
    try:
        value = _READERS[option.type](text if option.type == "texts" else stripped)
    except ValueError as error:
        wrong = _wrong(option.name, repr(text), KINDS[option.type])
        if option.type in WRITTEN:
            wrong.hint = f"write it as {WRITTEN[option.type]}"
        raise wrong from error
    return _checked(option, value)


def find(name: str) -> Option:
    """The option called `name`. Raises InvalidRequest with the nearest name."""
    key = name.replace("-", "_")
    if key not in _BY_NAME:
        near = difflib.get_close_matches(key, _BY_NAME, 1, 0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(_BY_NAME)}"
        raise InvalidRequest(f"there is no sampling option '{name}'.", hint=hint)
    return _BY_NAME[key]


def _read_bool(text: str) -> bool:
    lowered = text.lower()
    if lowered in {"true", "yes", "on", "1"}:
        return True
    if lowered in {"false", "no", "off", "0"}:
        return False
    raise ValueError(text)


def _read_texts(text: str) -> Any:
    return json.loads(text) if text.lstrip().startswith("[") else text


def _read_ids(text: str) -> list[int]:
    return [int(part) for part in text.split(",")] if text else []


def _read_biases(text: str) -> dict[int, float]:
    pairs = [part.split(":") for part in text.split(",") if part]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(text)
    return {int(token): float(bias) for token, bias in pairs}


_READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": _read_bool,
    "texts": _read_texts,
    "ids": _read_ids,
    "biases": _read_biases,
}


def _checked(option: Option, value: Any) -> Any:
    if option.type == "texts":
        return _checked_texts(option.name, value)
    if option.type == "ids":
        return _checked_ids(option.name, value)
    if option.type == "biases":
        return _checked_biases(option.name, value)
    if option.type == "bool":
        if not isinstance(value, bool):
            raise _wrong(option.name, _show(value), KINDS["bool"])
        return value
    return _number(option.name, value, option.type, option.bounds)


def _number(name: str, value: Any, kind: str, bounds: Bounds | None) -> Any:
    wanted = f"{KINDS[kind]}, {bounds}"
    right = isinstance(value, int) if kind == "int" else isinstance(value, int | float)
    if not right or isinstance(value, bool):
        raise _wrong(name, _show(value), wanted)
    if bounds is not None and value not in bounds:  # NaN lies in none
        raise _wrong(name, _show(value), wanted)
    return int(value) if kind == "int" else float(value)


def _checked_texts(name: str, value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise _wrong(name, _show(value), KINDS["texts"])
    if len(texts) > MAX_STOPS:
        raise InvalidRequest(f"{name} has {len(texts)} texts; it must have at most {MAX_STOPS}.")
    for text in texts:
        if not 1 <= len(text) <= MAX_STOP_CHARS:
            raise InvalidRequest(
                f"{name} has a text of {len(text)} characters; "
                f"each must have 1 to {MAX_STOP_CHARS}."
            )
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise InvalidRequest(f"{name} has a text that is not valid Unicode (lone surrogate).")
    return tuple(texts)


def _checked_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(name, _show(value), KINDS["ids"])
    if len(value) > MAX_STOP_IDS:
        raise InvalidRequest(f"{name} has {len(value)} ids; it must have at most {MAX_STOP_IDS}.")
    return tuple(_number(f"an id of {name}", token, "int", _TOKEN_ID) for token in value)


def _checked_biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise _wrong(name, _show(value), KINDS["biases"])
    if len(value) > MAX_BIASES:
        raise InvalidRequest(f"{name} has {len(value)} ids; it must have at most {MAX_BIASES}.")
    return {
        _number(f"an id of {name}", token, "int", _TOKEN_ID): _number(
            f"{name} of token {token}", bias, "float", _BIAS
        )
        for token, bias in value.items()
    }


def _wrong(name: str, shown: str, wanted: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is {shown}; it must be {wanted}.")


def _show(value: Any) -> str:
    """A value for a message, never longer than one line (an integer may have 5,000 digits)."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 128:
        return "an integer of more than 38 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
