"""OpenAI's dialect: bodies to sampling parameters, what came of them to choices and usage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from kvrun.errors import InvalidRequest
from kvrun.runtime.engine.request import Logprob
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.text import Text, TextStream
from kvrun.server.call import Call
from kvrun.server.errors import ApiError
from kvrun.server.generation import Generation
from kvrun.server.schemas.openai import Common
from kvrun.server.service import Service

FINGERPRINT = f"kvrun-{version('kvrun')}"
OPTIONS = {option.name for option in SamplingParams.options()}
# Fields that ask for something which would silently be missing from the answer.
UNSUPPORTED = (
    "response_format", "tools", "functions", "function_call", "structured_outputs", "grammar",
    "regex", "json_schema", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
    "watermark", "chat_template", "chat_template_kwargs", "audio", "prompt_embeds",
    "use_beam_search", "merged_adapters", "prediction", "documents", "prompt_logprobs",
)  # fmt: skip
HARMLESS = ({"type": "text"}, "none", "auto")


def refuse_unsupported(service: Service, extra: Mapping[str, Any] | None) -> None:
    """Raises ApiError for fields that kvrun knows and cannot serve; others are noted once."""
    given = {name: value for name, value in (extra or {}).items() if value}
    if "tools" in given and given.get("response_format") not in (None, {"type": "text"}):
        raise ApiError("tool", "Grammar and tools are mutually exclusive")
    for name, value in given.items():
        if name in UNSUPPORTED and value not in HARMLESS:
            raise ApiError("validation", f"{name} is not supported.", param=name)
        if name == "tool_choice" and value not in HARMLESS:
            raise ApiError("validation", "tool_choice needs tools.", param=name)
        if name not in UNSUPPORTED:
            service.warn_once(name)


def sampling(body: Common, service: Service, **changes: Any) -> SamplingParams:
    """The options of a body over the model's own defaults. Raises ApiError with the field."""
    all_given = {name: getattr(body, name, None) for name in OPTIONS} | changes
    given: dict[str, Any] = {name: value for name, value in all_given.items() if value is not None}
    stops = given.get("stop", ())
    most = service.settings.max_stop_sequences
    if not isinstance(stops, str) and len(stops) > most:
        raise ApiError("validation", f"stop has {len(stops)} texts; at most {most}.", param="stop")
    if "logit_bias" in given:
        given["logit_bias"] = _biases(given["logit_bias"])
    if given.get("n", 1) > service.settings.max_n:
        words = f"n is {given['n']}; it must be at most {service.settings.max_n}."
        raise ApiError("validation", words, param="n")
    defaults: dict[str, Any] = service.text.generation_defaults if service.has_text else {}
    try:
        params = SamplingParams(**{**defaults, **given})
        params.check_vocabulary(service.engine.vocab_size)
    except InvalidRequest as error:
        name = error.what.split(" ", 1)[0]
        raise ApiError("validation", error.what, param=name if name in OPTIONS else None) from None
    return params


def prompts(given: Any, param: str) -> list[str | list[int]]:
    """A text, token ids, or a list of either, as a list. Raises ApiError for an empty one."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        return [given]
    if not given:
        raise ApiError("validation", f"{param} is an empty list.", param=param)
    return list(given)


def check_ids(ids: Sequence[int], service: Service, param: str) -> list[int]:
    """Raises ApiError for a token id that the model does not have."""
    size = service.engine.vocab_size
    for token in ids:
        if not 0 <= token < size:
            words = f"{param} names a token that is not one of 0 to {size - 1}."
            raise ApiError("validation", words, param=param)
    return list(ids)


def _biases(given: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token): bias for token, bias in given.items()}
    except ValueError:
        words = "the keys of logit_bias must be token ids."
        raise ApiError("validation", words, param="logit_bias") from None


@dataclass(frozen=True)
class Head:
    """What the objects of one answer have in common."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def of(cls, generation: Generation, call: Call, body: Common, prefix: str, kind: str) -> "Head":
        service = generation.service
        return cls(f"{prefix}-{call.id}", kind, service.now(), model_name(generation, body.model))

    def around(self, choices: list[dict[str, Any]], usage: Any) -> dict[str, Any]:
        return {
            **vars(self),
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
            "usage": usage,
        }


def model_name(generation: Generation, named: str | None) -> str:
    """What has answered: the adapter, or the model by the name that was used."""
    names = generation.service.names
    return generation.adapter or (named if named in names else None) or names[0]


def usage_of(generations: Sequence[Generation]) -> dict[str, Any]:
    """Tokens of all prompts, each counted once, and of all answers, dropped ones too."""
    prompt = sum(generation.prompt_tokens for generation in generations)
    answer = sum(generation.tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {
            "cached_tokens": sum(generation.cached_tokens for generation in generations)
        },
    }


def require_ends(generations: Sequence[Generation]) -> None:
    """Raises ApiError (unavailable) for answers that were cut short before anybody saw them."""
    for generation in generations:
        if any(choice.finish_reason == "abort" for choice in generation.choices):
            raise ApiError("unavailable", "The answer could not be finished in time.")


def shown(text: Text | None, token: int) -> str:
    """A token's own text; a special token's name."""
    return text.decode([token], skip_special=False) if text else ""


def chat_logprobs(text: Text, entries: Sequence[Logprob]) -> dict[str, Any]:
    """Log-probabilities in the shape of chats."""

    def one(token: int, value: float) -> dict[str, Any]:
        said = shown(text, token)
        whole = "\ufffd" not in said  # part of a character has no text, so no bytes are known
        return {
            "token": said,
            "logprob": finite(value),
            "bytes": list(said.encode()) if whole else None,
        }

    return {
        "content": [
            {**one(e.token_id, e.logprob), "top_logprobs": [one(t, v) for t, v in e.top]}
            for e in entries
        ],
        "refusal": None,
    }


class _Places:
    """Where tokens begin in the text that they make, in characters, one token after the other."""

    def __init__(self, stream: TextStream | None, start: int = 0) -> None:
        self._stream, self._at = stream, start

    @property
    def here(self) -> int:
        return self._at + (self._stream.unsettled if self._stream else 0)

    def step(self, token: int) -> int:
        """Where this token begins."""
        start = self.here
        if self._stream:
            self._at += len(self._stream.push([token]))
        return start


@dataclass(frozen=True)
class Echo:
    """A prompt that is repeated: its text, and where each of its tokens begins in that."""

    text: str
    places: Sequence[int]

    @classmethod
    def of(
        cls, text: Text, prompt: str | Sequence[int], ids: Sequence[int], placed: bool
    ) -> "Echo":
        """Of a text what the tokenizer adds takes no place; of token ids every one is shown.

        Unless it is to be `placed` no place is known.
        """
        said = prompt if isinstance(prompt, str) else text.decode(ids, skip_special=False)
        if not placed:
            return cls(said, [])
        added = text.added(said) if said is prompt else [False] * len(ids)
        places = _Places(text.stream(skip_special=False))
        found = [
            places.here if extra else places.step(token)
            for token, extra in zip(ids, added, strict=True)
        ]
        return cls(said, [min(place, len(said)) for place in found])


class CompletionLogprobs:
    """Log-probabilities in the shape of completions, a part at a time; those of `echo` first."""

    def __init__(self, text: Text | None, echo: Echo) -> None:
        self._text = text
        self._prompt = iter(echo.places)
        self._answer = _Places(text.stream() if text else None, len(echo.text))

    def take(self, entries: Sequence[tuple[int, Logprob | None]]) -> dict[str, Any]:
        """Tokens with what is known of them; nothing is of the first token of a prompt."""
        return {
            "tokens": [shown(self._text, token) for token, _ in entries],
            "token_logprobs": [finite(e.logprob) if e else None for _, e in entries],
            "top_logprobs": [self._top(e) for _, e in entries],
            "text_offset": [self._place(token) for token, _ in entries],
        }

    def _top(self, entry: Logprob | None) -> dict[str, float] | None:
        if entry is None:
            return None
        return {shown(self._text, token): finite(value) for token, value in reversed(entry.top)}

    def _place(self, token: int) -> int:
        known = next(self._prompt, None)
        return self._answer.step(token) if known is None else known


def finite(value: float) -> float:
    """JSON has no infinity: a token that cannot come gets the number clients know for it."""
    return value if value > -9999.0 else -9999.0
