"""Text Generation Inference's own routes: /, /generate, /generate_stream, /invocations."""

import os
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvrun.server import native, sse
from kvrun.server.call import Call, ReadyService, ThisCall
from kvrun.server.errors import ApiError, json_response
from kvrun.server.native import Job
from kvrun.server.routes.chat import respond
from kvrun.server.routes.completions import complete
from kvrun.server.schemas.common import native_errors, or_events
from kvrun.server.schemas.native import CompatBody, GenerateBody, GenerateResponse
from kvrun.server.schemas.openai import Chat, ChatBody, Completion, CompletionBody
from kvrun.server.service import Service

router = APIRouter(tags=["native"])
ERRORS = native_errors()
EVENTS = or_events('data: {"index":1,"token":{...},"generated_text":null,"details":null}\n\n')


@router.post("/", response_model=list[GenerateResponse], responses={**ERRORS, 200: EVENTS})
async def compat_generate(body: CompatBody, service: ReadyService, call: ThisCall) -> Response:
    """Generate; `stream` chooses how. The prompt is repeated unless return_full_text is false."""
    return await _compat(body, service, call)


@router.post("/generate", response_model=GenerateResponse, responses=ERRORS)
async def generate(body: GenerateBody, service: ReadyService, call: ThisCall) -> Response:
    """Generate tokens."""
    job = await native.job(body, service, call, streamed=False)
    return json_response(await _finished(job), headers=_headers(job, call))


@router.post("/generate_stream", response_class=Response, responses={**ERRORS, 200: EVENTS})
async def generate_stream(body: GenerateBody, service: ReadyService, call: ThisCall) -> Response:
    """Generate tokens as server-sent events, one for each."""
    return _stream(await native.job(body, service, call, streamed=True), call)


@router.post(
    "/invocations",
    response_model=GenerateResponse | list[GenerateResponse] | Chat | Completion,
    responses={**ERRORS, 200: EVENTS},
)
async def invocations(
    body: CompatBody | ChatBody | CompletionBody, service: ReadyService, call: ThisCall
) -> Response:
    """SageMaker's only route: the body says which of the others is meant."""
    if isinstance(body, ChatBody):
        return await respond(body, service, call)
    if isinstance(body, CompletionBody):
        return await complete(body, service, call)
    return await _compat(body, service, call)


async def _compat(body: CompatBody, service: Service, call: Call) -> Response:
    job = await native.job(body, service, call, streamed=bool(body.stream), full_text=True)
    if body.stream:
        return _stream(job, call)
    return json_response([await _finished(job)], headers=_headers(job, call))


async def _finished(job: Job) -> dict[str, Any]:
    with job.service.admitted(len(job.generation.choices)):
        async for _ in job.generation.pieces():
            pass
    return native.response(job)


def _stream(job: Job, call: Call) -> Response:
    return sse.EventStream(
        _events(job), job.service.streams, call=call, failed=_failed, headers=_compute(job)
    )


async def _events(job: Job) -> AsyncGenerator[bytes]:
    events = native.Events(job)
    with job.service.admitted(1):
        async for piece in job.generation.pieces():
            for event in events.take(piece):
                yield sse.frame(event)


def _failed(error: ApiError) -> bytes:
    return sse.frame(error.body(False))


def _compute(job: Job) -> dict[str, str]:
    kind = os.environ.get("COMPUTE_TYPE", f"{job.service.engine.device.split(':')[0]}+optimized")
    return {"x-compute-type": kind, "x-compute-characters": str(len(job.prompt))}


def _headers(job: Job, call: Call) -> dict[str, str]:
    """Times in milliseconds, as dashboards read them from every answer."""
    generation = job.generation
    tokens = generation.tokens
    inference = generation.last - generation.first
    times = {
        "total": call.seconds,
        "validation": generation.sent - call.began,
        "queue": generation.first - generation.sent,
        "inference": inference,
    }
    milliseconds = {f"x-{name}-time": str(round(1000 * value)) for name, value in times.items()}
    return {
        **_compute(job),
        "x-compute-time": str(call.seconds),
        **milliseconds,
        "x-time-per-token": str(round(1000 * inference / max(1, tokens))),
        "x-prompt-tokens": str(generation.prompt_tokens),
        "x-generated-tokens": str(tokens),
    }
