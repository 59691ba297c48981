"""/v1/completions: prompts to be continued."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvrun.runtime.engine.request import Logprob
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.server import openai, sse
from kvrun.server.call import Call, ReadyService, ThisCall
from kvrun.server.errors import ApiError, json_response
from kvrun.server.generation import Choice, Generation, Piece, together
from kvrun.server.openai import CompletionLogprobs, Echo, Head, usage_of
from kvrun.server.schemas.common import openai_errors, or_events
from kvrun.server.schemas.openai import Completion, CompletionBody
from kvrun.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"])


@dataclass
class Plan:
    """What a body asks for, checked and tokenized."""

    body: CompletionBody
    service: Service
    generations: list[Generation]
    echoes: list[Echo]  # empty ones, where prompts shall not be repeated
    n: int  # answers to return for each prompt
    head: Head

    @property
    def answers(self) -> int:
        return sum(len(generation.choices) for generation in self.generations)


@router.post(
    "/completions",
    response_model=Completion,
    responses={**openai_errors(), 200: or_events("data: {...}\n\ndata: [DONE]\n\n")},
)
async def completions(body: CompletionBody, service: ReadyService, call: ThisCall) -> Response:
    """Continue text or token ids; several prompts, several answers each."""
    return await complete(body, service, call)


async def complete(body: CompletionBody, service: Service, call: Call) -> Response:
    plan = await _plan(body, service, call)
    if body.stream:
        return sse.EventStream(_events(plan), service.streams, call=call, failed=_failed)
    with service.admitted(plan.answers):
        async for _ in together(plan.generations):
            pass
    openai.require_ends(plan.generations)
    if body.max_tokens == 0:
        for generation in plan.generations:
            generation.forget_answers()
    choices = [
        _choice(plan, number * plan.n + place, number, choice)
        for number in range(len(plan.generations))
        for place, choice in enumerate(_best(plan, number))
    ]
    return json_response(plan.head.around(choices, usage_of(plan.generations)))


async def _plan(body: CompletionBody, service: Service, call: Call) -> Plan:
    openai.refuse_unsupported(service, body.model_extra)
    adapter = service.adapter(body.model, body.adapter_id, body.lora_id)
    if body.suffix:
        raise ApiError("validation", "suffix is not supported.", param="suffix")
    params, n = _sampling(body, service)
    prompts = openai.prompts(body.prompt, "prompt")
    most = service.settings.max_client_batch_size
    if len(prompts) > most:
        words = f"prompt has {len(prompts)} prompts; at most {most} (--max-client-batch-size)."
        raise ApiError("validation", words, param="prompt")
    generations, echoes = [], []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = await service.encode(prompt)
        else:
            ids = openai.check_ids(prompt, service, "prompt")
        service.check_length(len(ids), params.max_tokens, "prompt")
        generations.append(Generation(service, call, ids, params, adapter=adapter))
        echoes.append(await _echoed(body, service, prompt, ids))
    head = Head.of(generations[0], call, body, "cmpl", "text_completion")
    return Plan(body, service, generations, echoes, n, head)


def _sampling(body: CompletionBody, service: Service) -> tuple[SamplingParams, int]:
    """The engine's parameters, and how many answers each prompt gets back."""
    changes: dict[str, Any] = {}
    if body.max_tokens == 0:
        if not body.echo or body.stream:
            words = "max_tokens must be at least 1, unless echo is set and stream is not."
            raise ApiError("validation", words, param="max_tokens")
        changes["max_tokens"] = 1  # the engine makes one all the same; nobody is told
    if body.echo and body.logprobs is not None:
        changes["prompt_logprobs"] = body.logprobs
    params = openai.sampling(body, service, **changes)
    n = params.n
    if body.best_of is not None:
        if body.best_of < n:
            raise ApiError("validation", f"best_of must be at least n ({n}).", param="best_of")
        if body.best_of > service.settings.max_n:
            words = f"best_of must be at most {service.settings.max_n}."
            raise ApiError("validation", words, param="best_of")
        if body.best_of > n and body.stream:
            words = "best_of above n cannot be streamed."
            raise ApiError("validation", words, param="best_of")
        if body.best_of > n and params.logprobs is None:
            params = replace(params, logprobs=0)
        params = replace(params, n=body.best_of)
    return params, n


async def _echoed(
    body: CompletionBody, service: Service, prompt: str | list[int], ids: list[int]
) -> Echo:
    if not body.echo:
        return Echo("", [])
    if not service.has_text:
        return Echo("", [0] * len(ids))
    placed = body.logprobs is not None
    return await service.in_thread(Echo.of, service.text, prompt, ids, placed)


def _best(plan: Plan, number: int) -> Sequence[Choice]:
    choices = plan.generations[number].choices
    if len(choices) == plan.n:
        return choices
    return sorted(choices, key=lambda choice: choice.mean_logprob, reverse=True)[: plan.n]


def _prompt(plan: Plan, number: int) -> list[tuple[int, Logprob | None]]:
    """The prompt's tokens, where they are repeated; nothing comes before the first."""
    if not plan.body.echo:
        return []
    generation = plan.generations[number]
    known = [(entry.token_id, entry) for entry in generation.prompt_logprobs]
    return [(generation.request.prompt_ids[0], None), *known]


def _choice(plan: Plan, index: int, number: int, choice: Choice) -> dict[str, Any]:
    logprobs = None
    if plan.body.logprobs is not None:
        text = plan.service.text if plan.service.has_text else None
        known = [*_prompt(plan, number), *((entry.token_id, entry) for entry in choice.logprobs)]
        logprobs = CompletionLogprobs(text, plan.echoes[number]).take(known)
    return {
        "index": index,
        "text": plan.echoes[number].text + choice.text,
        "logprobs": logprobs,
        "finish_reason": choice.finish_reason,
    }


# -- streamed ---------------------------------------------------------------------------------


async def _events(plan: Plan) -> AsyncGenerator[bytes]:
    options = plan.body.stream_options
    each = bool(options and options.continuous_usage_stats)
    text = plan.service.text if plan.service.has_text else None
    templates = [_template(plan, index) for index in range(len(plan.generations) * plan.n)]
    logprobs = [CompletionLogprobs(text, echo) for echo in plan.echoes for _ in range(plan.n)]
    with plan.service.admitted(plan.answers):
        echoed = set() if plan.body.echo else set(range(len(plan.generations)))
        async for number, piece in together(plan.generations):
            if number not in echoed:
                echoed.add(number)
                for index in range(number * plan.n, number * plan.n + plan.n):
                    yield _echo(plan, number, index, logprobs[index])
            index = number * plan.n + piece.index
            if plan.body.logprobs is None and not piece.finish_reason and not each:
                if piece.text:
                    yield templates[index].fill(piece.text)
                continue
            usage = usage_of(plan.generations) if each else None
            entries = None if plan.body.logprobs is None else _entries(logprobs[index], piece)
            yield sse.frame(plan.head.around([_part(index, piece, entries)], usage))
    if options and options.include_usage:
        yield sse.frame(plan.head.around([], usage_of(plan.generations)))
    yield sse.DONE


def _echo(plan: Plan, number: int, index: int, logprobs: CompletionLogprobs) -> bytes:
    asked = plan.body.logprobs is not None
    entries = logprobs.take(_prompt(plan, number)) if asked else None
    part = Piece(index, plan.echoes[number].text, [], [], None)
    return sse.frame(plan.head.around([_part(index, part, entries)], None))


def _template(plan: Plan, index: int) -> sse.Template:
    part = Piece(index, sse.Template.MARK, [], [], None)
    return sse.Template(plan.head.around([_part(index, part, None)], None))


def _entries(logprobs: CompletionLogprobs, piece: Piece) -> dict[str, Any]:
    return logprobs.take([(entry.token_id, entry) for entry in piece.logprobs])


def _part(index: int, piece: Piece, logprobs: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "index": index,
        "text": piece.text,
        "logprobs": logprobs,
        "finish_reason": piece.finish_reason,
    }


def _failed(error: ApiError) -> bytes:
    return sse.frame(error.body(True, streamed=True)) + sse.DONE
