"""The native dialect: parameters checked in Text Generation Inference's words, its shapes."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvrun.errors import InvalidRequest
from kvrun.runtime.engine.request import Logprob
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.server.call import Call
from kvrun.server.errors import ApiError
from kvrun.server.generation import Choice, Generation, Piece
from kvrun.server.openai import finite
from kvrun.server.schemas.native import GenerateBody, Parameters
from kvrun.server.service import Service
from kvrun.server.settings import Settings

WARPERS = ("temperature", "top_k", "top_p", "typical_p")
ABSENT = Parameters(do_sample=True)  # what no parameters at all mean


def invalid(words: str) -> ApiError:
    return ApiError("validation", words)


@dataclass
class Job:
    """A native request, checked and tokenized."""

    service: Service
    parameters: Parameters
    generation: Generation
    prompt: str
    seed: int | None  # None when every draw is greedy
    full_text: bool

    @property
    def details(self) -> bool:
        return bool(self.parameters.details or self.parameters.decoder_input_details)

    def text(self, choice: Choice) -> str:
        return self.prompt + choice.text if self.full_text else choice.text


async def job(
    body: GenerateBody, service: Service, call: Call, *, streamed: bool, full_text: bool = False
) -> Job:
    """Check a body in the order and the words clients know. Raises ApiError (validation)."""
    given = body.parameters or ABSENT
    adapter = service.adapter(given.adapter_id, given.lora_id)
    _check(given, service.settings, streamed)
    if not body.inputs:
        raise invalid("`inputs` cannot be empty")
    ids = await _encode(body.inputs, given, service)
    most = given.max_new_tokens
    service.check_length(len(ids), most, "inputs")
    sampled = bool(given.do_sample) or any(getattr(given, w) is not None for w in WARPERS)
    seed = given.seed if given.seed is not None else secrets.randbits(63)
    params = _params(given, service, seed if sampled else None)
    generation = Generation(service, call, ids, params, adapter=adapter, include_stop=True)
    wanted = given.return_full_text
    return Job(
        service, given, generation, body.inputs, params.seed,
        full_text if wanted is None else wanted,
    )  # fmt: skip


async def _encode(inputs: str, given: Parameters, service: Service) -> list[int]:
    most = service.max_input_tokens
    truncate = given.truncate
    if truncate is not None and not 0 < truncate <= most:
        raise invalid(
            f"`truncate` must be strictly positive and less than {most}. Given: {truncate}"
        )
    ids = await service.encode(inputs, "inputs")
    return ids[-truncate:] if truncate else ids


def _check(given: Parameters, settings: Settings, streamed: bool) -> None:
    best_of = given.best_of if given.best_of is not None else 1
    if streamed and best_of != 1:
        raise invalid("`best_of` != 1 is not supported when streaming tokens")
    if streamed and given.decoder_input_details:
        raise invalid("`decoder_input_details` == true is not supported when streaming tokens")
    if not 0 < best_of <= settings.max_best_of:
        raise invalid(f"`best_of` must be > 0 and <= {settings.max_best_of}. Given: {best_of}")
    sampled = bool(given.do_sample) or any(getattr(given, w) is not None for w in WARPERS)
    if best_of > 1 and not sampled:
        raise invalid("you must use sampling when `best_of` is > 1")
    for name in ("temperature", "repetition_penalty"):
        _positive(given, name)
    penalty = given.frequency_penalty
    if penalty is not None and not -2 <= penalty <= 2:
        raise invalid("`frequency_penalty` must be >= -2.0 and <= 2.0")
    _positive(given, "top_k")
    for name in ("top_p", "typical_p"):
        value = getattr(given, name)
        if value is not None and not 0 < value < 1:
            raise invalid(f"`{name}` must be > 0.0 and < 1.0")
    _positive(given, "max_new_tokens")
    stops = len(given.stop or ())
    if stops > settings.max_stop_sequences:
        raise invalid(
            f"`stop` supports up to {settings.max_stop_sequences} stop sequences. Given: {stops}"
        )
    if best_of > 1 and given.seed is not None:
        raise invalid("`seed` must not be set when `best_of` > 1")
    top = given.top_n_tokens or 0
    if not 0 <= top <= settings.max_top_n_tokens:
        raise invalid(
            f"`top_n_tokens` must be >= 0 and <= {settings.max_top_n_tokens}. Given: {top}"
        )
    if given.grammar:
        raise invalid("grammar is not supported")
    if (given.model_extra or {}).get("merged_adapters"):
        raise invalid("merged_adapters is not supported")
    if given.watermark:
        raise invalid("watermark is not supported")


def _positive(given: Parameters, name: str) -> None:
    value = getattr(given, name)
    if value is not None and value <= 0:
        raise invalid(f"`{name}` must be strictly positive")


def _params(given: Parameters, service: Service, seed: int | None) -> SamplingParams:
    same = ("repetition_penalty", "frequency_penalty", "top_k", "top_p", "typical_p")
    options: dict[str, Any] = {name: getattr(given, name) for name in same}
    options["max_tokens"] = given.max_new_tokens
    options["temperature"] = 0.0 if seed is None else given.temperature
    options["stop"] = given.stop
    options["n"] = given.best_of
    options["seed"] = seed
    options["logprobs"] = given.top_n_tokens or 0
    options["prompt_logprobs"] = 0 if given.decoder_input_details else None
    try:
        return SamplingParams(**{k: v for k, v in options.items() if v is not None})
    except InvalidRequest as error:
        raise invalid(error.what) from None


class TokenTexts:
    """The text of each token of one answer as it comes; together they are the answer's text.

    Special tokens are shown by name, and are no part of the text.
    """

    def __init__(self, job: Job) -> None:
        text = job.service.text
        self._special = text.special_ids
        self._stream = text.stream(skip_special=False)
        self._count = self._size = 0

    def take(self, token: int, choice: Choice) -> tuple[str, bool]:
        """The text of the next token, and whether it is special."""
        said = self._stream.push([token])
        self._count += 1
        special = token in self._special
        if not special:
            if choice.stop_strings() and self._count == len(choice.token_ids):
                # What follows a stop text inside its last token is no part of the answer.
                said = said[: max(0, len(choice.text) - self._size)]
            self._size += len(said)
        return said, special


def token(entry: Logprob, said: tuple[str, bool]) -> dict[str, Any]:
    text, special = said
    return {
        "id": entry.token_id, "text": text, "logprob": finite(entry.logprob), "special": special,
    }  # fmt: skip


def top_tokens(job: Job, entry: Logprob) -> list[dict[str, Any]]:
    """The likeliest tokens at one place."""
    text = job.service.text
    return [
        {
            "id": token_id,
            "text": text.decode([token_id], skip_special=False),
            "logprob": finite(value),
            "special": token_id in text.special_ids,
        }
        for token_id, value in entry.top
    ]


def finish_reason(job: Job, choice: Choice) -> str:
    """In the order clients know: length, then the end of text, then a stop text."""
    most = job.generation.request.params.max_tokens
    if choice.finish_reason == "abort":
        raise ApiError("incomplete", "Generation was cut short.")
    if choice.finish_reason == "length" or (most and len(choice.token_ids) >= most):
        return "length"
    ends = job.service.text.eos_token_ids
    ended = not choice.stop_strings() and choice.token_ids and choice.token_ids[-1] in ends
    return "eos_token" if ended else "stop_sequence"


def details(job: Job, choice: Choice) -> dict[str, Any]:
    texts = TokenTexts(job)
    tokens = [token(entry, texts.take(entry.token_id, choice)) for entry in choice.logprobs]
    found = {
        "finish_reason": finish_reason(job, choice),
        "generated_tokens": len(choice.token_ids),
        "seed": job.seed,
        "prefill": prefill(job),
        "tokens": tokens,
    }
    if job.parameters.top_n_tokens:
        found["top_tokens"] = [top_tokens(job, entry) for entry in choice.logprobs]
    return found


def prefill(job: Job) -> list[dict[str, Any]]:
    """The prompt's tokens; nothing comes before the first, so nothing makes it likely."""
    if not job.parameters.decoder_input_details:
        return []
    generation, text = job.generation, job.service.text
    stream = text.stream(skip_special=False)
    known = [None, *(finite(entry.logprob) for entry in generation.prompt_logprobs)]
    ids = generation.request.prompt_ids
    return [
        {"id": token, "text": stream.push([token]), "logprob": value}
        for token, value in zip(ids, known, strict=True)
    ]


def response(job: Job) -> dict[str, Any]:
    """A GenerateResponse; of several answers the one whose tokens were likeliest."""
    choices: Sequence[Choice] = job.generation.choices
    ranked = sorted(choices, key=lambda choice: choice.mean_logprob, reverse=True)
    best = ranked[0]
    finish_reason(job, best)  # raises for an answer that was cut short
    found: dict[str, Any] = {"generated_text": job.text(best)}
    if job.details:
        found["details"] = details(job, best)
        if len(ranked) > 1:
            found["details"]["best_of_sequences"] = [
                {"generated_text": job.text(choice), **details(job, choice)}
                for choice in ranked[1:]
            ]
    return found


class Events:
    """A streamed answer as StreamResponses, one for each token."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._texts = TokenTexts(job)
        self._index = 0

    def take(self, piece: Piece) -> list[dict[str, Any]]:
        choice = self._job.generation.choices[0]
        events = []
        for place, entry in enumerate(piece.logprobs, 1):
            self._index += 1
            event: dict[str, Any] = {
                "index": self._index,
                "token": token(entry, self._texts.take(entry.token_id, choice)),
                "generated_text": None,
                "details": None,
            }
            if self._job.parameters.top_n_tokens:
                event["top_tokens"] = top_tokens(self._job, entry)
            if piece.finish_reason and place == len(piece.logprobs):
                event |= self._end(choice)
            events.append(event)
        if piece.finish_reason and not piece.logprobs:
            finish_reason(self._job, choice)  # raises: nothing ends without a token but this
        return events

    def _end(self, choice: Choice) -> dict[str, Any]:
        end: dict[str, Any] = {"generated_text": self._job.text(choice)}
        if self._job.parameters.details:
            end["details"] = {
                "finish_reason": finish_reason(self._job, choice),
                "generated_tokens": len(choice.token_ids),
                "seed": self._job.seed,
                "input_length": self._job.generation.prompt_tokens,
            }
        return end
