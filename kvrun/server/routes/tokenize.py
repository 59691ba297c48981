"""Text to tokens and back: /tokenize, /chat_tokenize, /detokenize, /tokenizer_info."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvrun.runtime.text import Text
from kvrun.server import messages
from kvrun.server.call import ReadyService
from kvrun.server.errors import ApiError, json_response
from kvrun.server.openai import check_ids
from kvrun.server.schemas.common import native_errors
from kvrun.server.schemas.native import (
    ChatTokenized,
    DetokenizeBody,
    Detokenized,
    SimpleToken,
    TokenizeBody,
    TokenizerInfo,
    Tokens,
)
from kvrun.server.schemas.openai import ChatBody

router = APIRouter(tags=["tokenizer"])
ERRORS = native_errors(400, 401, 403, 404, 413, 415, 422, 503)


@router.post("/tokenize", response_model=list[SimpleToken] | Tokens, responses=ERRORS)
async def tokenize(body: TokenizeBody, service: ReadyService) -> Response:
    """Tokens of a text: with their places for `inputs` (TGI), their ids for `prompt` (vLLM)."""
    if not service.has_text:
        raise ApiError("not_found", "no fast tokenizer")
    if body.inputs is not None:
        service.refuse_bulk(len(body.inputs), "inputs")
        spans = await service.in_thread(service.text.spans, body.inputs)
        data = body.inputs.encode()
        return json_response([_token(token, data, start, stop) for token, start, stop in spans])
    if body.prompt is None:
        raise ApiError("validation", "either `inputs` or `prompt` is needed")
    ids = await service.encode(body.prompt)
    return json_response(
        {"tokens": ids, "count": len(ids), "max_model_len": service.max_total_tokens}
    )


@router.post("/chat_tokenize", response_model=ChatTokenized, responses=ERRORS)
async def chat_tokenize(body: ChatBody, service: ReadyService) -> Response:
    """Tokens of a conversation, as the model's template puts it."""
    ids = (await messages.encode(service, body.messages)).ids
    tokens, text = await service.in_thread(_pieces, service.text, ids)
    return json_response({"tokenize_response": tokens, "templated_text": text})


@router.post("/detokenize", response_model=Detokenized, responses=ERRORS)
async def detokenize(body: DetokenizeBody, service: ReadyService) -> Response:
    """The text of token ids, special tokens by name."""
    if len(body.tokens) > service.max_total_tokens:
        raise ApiError("validation", f"at most {service.max_total_tokens} tokens are taken")
    ids = check_ids(body.tokens, service, "tokens")
    text = await service.in_thread(service.text.decode, ids, False)
    return json_response({"prompt": text})


@router.get("/tokenizer_info", response_model=TokenizerInfo, responses=ERRORS)
async def tokenizer_info(service: ReadyService) -> Response:
    """The special tokens by their roles, for clients that tokenize on the server."""
    return json_response(service.text.named_tokens)


def _token(token: int, data: bytes, start: int, stop: int) -> dict[str, Any]:
    text = data[start:stop].decode(errors="ignore")
    return {"id": token, "text": text, "start": start, "stop": stop}


def _pieces(text: Text, ids: list[int]) -> tuple[list[dict[str, Any]], str]:
    """Tokens with their places in the text that they make together, in bytes."""
    stream, tokens, at, whole = text.stream(skip_special=False), [], 0, []
    for number, token in enumerate(ids, 1):
        piece = stream.push([token]) + (stream.finish() if number == len(ids) else "")
        end = at + len(piece.encode())
        tokens.append({"id": token, "text": piece, "start": at, "stop": end})
        whole.append(piece)
        at = end
    return tokens, "".join(whole)
