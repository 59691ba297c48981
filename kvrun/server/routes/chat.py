"""/v1/chat/completions: conversations."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvrun.server import openai, sse
from kvrun.server.call import Call, ReadyService, ThisCall
from kvrun.server.errors import ApiError, json_response
from kvrun.server.generation import Choice, Generation
from kvrun.server.messages import encode
from kvrun.server.openai import Head, chat_logprobs, usage_of
from kvrun.server.schemas.common import openai_errors, or_events
from kvrun.server.schemas.openai import Chat, ChatBody
from kvrun.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"])


@router.post(
    "/chat/completions",
    response_model=Chat,
    responses={**openai_errors(), 200: or_events("data: {...}\n\ndata: [DONE]\n\n")},
)
async def chat_completions(body: ChatBody, service: ReadyService, call: ThisCall) -> Response:
    """Answer a conversation. A last message of the assistant is continued."""
    return await respond(body, service, call)


async def respond(body: ChatBody, service: Service, call: Call) -> Response:
    generation = await _generation(body, service, call)
    if body.stream:
        events = _events(body, service, call, generation)
        return sse.EventStream(events, service.streams, call=call, failed=_failed)
    with service.admitted(len(generation.choices)):
        async for _ in generation.pieces():
            pass
    openai.require_ends([generation])
    head = Head.of(generation, call, body, "chatcmpl", "chat.completion")
    choices = [
        _choice(body, service, index, choice) for index, choice in enumerate(generation.choices)
    ]
    return json_response(head.around(choices, usage_of([generation])))


async def _generation(body: ChatBody, service: Service, call: Call) -> Generation:
    openai.refuse_unsupported(service, body.model_extra)
    adapter = service.adapter(body.model, body.adapter_id, body.lora_id)
    if body.top_logprobs and not body.logprobs:
        raise ApiError("validation", "top_logprobs needs logprobs.", param="top_logprobs")
    params = openai.sampling(
        body,
        service,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    ids, images = await encode(service, body.messages)
    service.check_length(len(ids), params.max_tokens, "messages")
    return Generation(service, call, ids, params, adapter=adapter, images=images)


def _choice(body: ChatBody, service: Service, index: int, choice: Choice) -> dict[str, Any]:
    return {
        "index": index,
        "message": {"role": "assistant", "content": choice.text, "refusal": None},
        "logprobs": chat_logprobs(service.text, choice.logprobs) if body.logprobs else None,
        "finish_reason": choice.finish_reason,
    }


# -- streamed ---------------------------------------------------------------------------------


async def _events(
    body: ChatBody, service: Service, call: Call, generation: Generation
) -> AsyncGenerator[bytes]:
    head = Head.of(generation, call, body, "chatcmpl", "chat.completion.chunk")
    options = body.stream_options
    each = bool(options and options.continuous_usage_stats)
    count = len(generation.choices)
    templates = [
        sse.Template(_chunk(head, i, {"content": sse.Template.MARK})) for i in range(count)
    ]
    opened = False
    with service.admitted(count):
        async for piece in generation.pieces():
            if not opened:  # once it is known that the engine takes the request
                opened = True
                for index in range(count):
                    yield sse.frame(_chunk(head, index, {"role": "assistant", "content": ""}))
            if not (body.logprobs or piece.finish_reason or each):
                if piece.text:
                    yield templates[piece.index].fill(piece.text)
                continue
            delta = {"content": piece.text} if piece.text or piece.logprobs else {}
            chunk = _chunk(head, piece.index, delta)
            chunk["choices"][0]["finish_reason"] = piece.finish_reason
            if body.logprobs and piece.logprobs:
                chunk["choices"][0]["logprobs"] = chat_logprobs(service.text, piece.logprobs)
            chunk["usage"] = usage_of([generation]) if each else None
            yield sse.frame(chunk)
    if options and options.include_usage:
        yield sse.frame(head.around([], usage_of([generation])))
    yield sse.DONE


def _chunk(head: Head, index: int, delta: dict[str, str]) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
    return head.around([choice], None)


def _failed(error: ApiError) -> bytes:
    return sse.frame(error.body(True, streamed=True)) + sse.DONE
