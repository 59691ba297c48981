"""/v1/responses: one turn of OpenAI's newer interface; nothing is stored."""

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvrun.server import openai, sse
from kvrun.server.call import Call, ReadyService, ThisCall
from kvrun.server.errors import ApiError, json_response
from kvrun.server.generation import Generation
from kvrun.server.messages import encode
from kvrun.server.openai import usage_of
from kvrun.server.schemas.common import openai_errors, or_events
from kvrun.server.schemas.openai import Message, ResponseObject, ResponsesBody
from kvrun.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"])
EVENTS = or_events('event: response.output_text.delta\ndata: {"type":...,"delta":"..."}\n\n')
# What only a server that remembers answers could do.
STATEFUL = ("previous_response_id", "conversation", "background", "store", "prompt", "include")


@router.post(
    "/responses", response_model=ResponseObject, responses={**openai_errors(), 200: EVENTS}
)
async def responses(body: ResponsesBody, service: ReadyService, call: ThisCall) -> Response:
    """Answer a text or a conversation."""
    turn = await _turn(body, service, call)
    if body.stream:
        events = _events(turn)
        return sse.EventStream(events, service.streams, call=call, failed=turn.failed)
    with service.admitted(1):
        async for _ in turn.generation.pieces():
            pass
    openai.require_ends([turn.generation])
    return json_response(turn.response())


async def _turn(body: ResponsesBody, service: Service, call: Call) -> "_Turn":
    extra = dict(body.model_extra or {})
    for name in STATEFUL:
        if extra.pop(name, None):
            words = f"{name} is not supported: nothing is stored here."
            raise ApiError("validation", words, param=name)
    form = extra.pop("text", None)
    if isinstance(form, dict) and form.get("format") not in (None, {"type": "text"}):
        raise ApiError("validation", "text.format must be text.", param="text")
    if extra.pop("truncation", None) not in (None, "disabled"):
        raise ApiError("validation", "truncation must be disabled.", param="truncation")
    openai.refuse_unsupported(service, extra)
    if getattr(body, "n", None) not in (None, 1):
        raise ApiError("validation", "a response has one answer; n must be 1.", param="n")
    adapter = service.adapter(body.model, body.adapter_id, body.lora_id)
    params = openai.sampling(body, service, max_tokens=body.max_output_tokens)
    ids, images = await encode(service, _messages(body))
    service.check_length(len(ids), params.max_tokens, "input")
    generation = Generation(service, call, ids, params, adapter=adapter, images=images)
    return _Turn(body, call, service, generation)


def _messages(body: ResponsesBody) -> list[Message]:
    said = body.input
    items = [Message(role="user", content=said)] if isinstance(said, str) else said
    if not items:
        raise ApiError("validation", "input is an empty list.", param="input")
    for item in items:
        kind = (item.model_extra or {}).pop("type", "message")
        if kind != "message":
            raise ApiError("validation", "input takes messages only.", param="input")
        for name in ("id", "status"):
            (item.model_extra or {}).pop(name, None)
    first = [Message(role="system", content=body.instructions)] if body.instructions else []
    return [*first, *items]


class _Turn:
    """One response as it comes to be."""

    def __init__(
        self, body: ResponsesBody, call: Call, service: Service, generation: Generation
    ) -> None:
        self.generation = generation
        self.item = f"msg-{call.id}"
        self._body = body
        self._id = f"resp-{call.id}"
        self._created = service.now()
        self._model = openai.model_name(generation, body.model)
        self._events = 0

    def event(self, kind: str, **fields: Any) -> bytes:
        value = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return f"event: {kind}\n".encode() + sse.frame(value)

    def failed(self, error: ApiError) -> bytes:
        told = error.body(True, streamed=True)["error"]
        fault = {"code": told["code"] or told["type"], "message": told["message"]}
        return self.event("response.failed", response=self.response("failed", error=fault))

    def part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def message(self, status: str) -> dict[str, Any]:
        content = [self.part(self.generation.choices[0].text)] if status != "in_progress" else []
        return {
            "type": "message", "id": self.item, "status": status, "role": "assistant",
            "content": content,
        }  # fmt: skip

    @property
    def status(self) -> str:
        reason = self.generation.choices[0].finish_reason
        return "completed" if reason == "stop" else "incomplete"

    def response(self, status: str | None = None, error: Any = None) -> dict[str, Any]:
        """The response object; without a status the one that the answer has ended with."""
        body, params = self._body, self.generation.request.params
        ended = status is None
        status = status or self.status
        why = "max_output_tokens" if params.max_tokens else "context_length"
        cut = self.generation.choices[0].finish_reason == "length"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": why if cut else "aborted"}
            if status == "incomplete"
            else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._model,
            "output": [self.message(status)] if ended else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": self._usage() if ended else None,
        }

    def _usage(self) -> dict[str, Any]:
        usage = usage_of([self.generation])
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }


async def _events(turn: _Turn) -> AsyncGenerator[bytes]:
    place = {"item_id": turn.item, "output_index": 0, "content_index": 0}
    with turn.generation.service.admitted(1):
        opened = False
        async for piece in turn.generation.pieces():
            if not opened:
                opened = True
                for frame in _opening(turn, place):
                    yield frame
            if piece.text:
                kind = "response.output_text.delta"
                yield turn.event(kind, **place, delta=piece.text, logprobs=[])
    text = turn.generation.choices[0].text
    yield turn.event("response.output_text.done", **place, text=text, logprobs=[])
    yield turn.event("response.content_part.done", **place, part=turn.part(text))
    item = turn.message(turn.status)
    yield turn.event("response.output_item.done", output_index=0, item=item)
    yield turn.event(f"response.{turn.status}", response=turn.response())


def _opening(turn: _Turn, place: dict[str, Any]) -> list[bytes]:
    begun = turn.response("in_progress")
    return [
        turn.event("response.created", response=begun),
        turn.event("response.in_progress", response=begun),
        turn.event("response.output_item.added", output_index=0, item=turn.message("in_progress")),
        turn.event("response.content_part.added", **place, part=turn.part("")),
    ]
