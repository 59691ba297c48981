"""/v1/embeddings: what the model makes of texts, as vectors of length 1."""

import base64
import math
import struct
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvrun.runtime.sampling.params import SamplingParams
from kvrun.server import openai
from kvrun.server.call import Call, ReadyService, ThisCall
from kvrun.server.errors import ApiError, json_response
from kvrun.server.generation import Generation, together
from kvrun.server.schemas.common import openai_errors
from kvrun.server.schemas.openai import Embeddings, EmbeddingsBody
from kvrun.server.service import Service

router = APIRouter(prefix="/v1", tags=["openai"])
MAX_INPUTS = 2048  # OpenAI's own
AT_ONCE = 32  # of one request; each takes a place as an answer does


@router.post("/embeddings", response_model=Embeddings, responses=openai_errors())
async def embeddings(body: EmbeddingsBody, service: ReadyService, call: ThisCall) -> Response:
    """Texts or token ids as vectors: the last token's state behind the last norm, of length 1."""
    generations = await _generations(body, service, call)
    with service.admitted(min(AT_ONCE, service.settings.max_concurrent_requests, len(generations))):
        for start in range(0, len(generations), AT_ONCE):
            async for _ in together(generations[start : start + AT_ONCE]):
                pass
    openai.require_ends(generations)
    data = [
        {"object": "embedding", "index": index, "embedding": _vector(generation, body)}
        for index, generation in enumerate(generations)
    ]
    tokens = sum(generation.prompt_tokens for generation in generations)
    return json_response(
        {
            "object": "list",
            "data": data,
            "model": openai.model_name(generations[0], body.model),
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


async def _generations(body: EmbeddingsBody, service: Service, call: Call) -> list[Generation]:
    openai.refuse_unsupported(service, body.model_extra)
    adapter = service.adapter(body.model, body.adapter_id, body.lora_id)
    inputs = openai.prompts(body.input, "input")
    if len(inputs) > MAX_INPUTS:
        words = f"input has {len(inputs)} texts; at most {MAX_INPUTS}."
        raise ApiError("validation", words, param="input")
    found = []
    for one in inputs:
        if isinstance(one, str):
            ids = await service.encode(one, "input")
        else:
            ids = openai.check_ids(one, service, "input")
        service.check_length(len(ids), None, "input")
        params = SamplingParams()
        found.append(Generation(service, call, ids, params, adapter=adapter, pooling=True))
    return found


def _vector(generation: Generation, body: EmbeddingsBody) -> Any:
    """Little-endian fp32 values in base64, or a list of numbers."""
    state = generation.state
    size = len(state) // 4
    if body.dimensions is not None and body.dimensions != size:
        if body.dimensions > size:
            words = f"dimensions is {body.dimensions}; this model's vectors have {size}."
            raise ApiError("validation", words, param="dimensions")
        state = _cut(state, body.dimensions)
    if body.encoding_format == "base64":
        return base64.b64encode(state).decode()
    return list(struct.unpack(f"<{len(state) // 4}f", state))


def _cut(state: bytes, size: int) -> bytes:
    """Its first values, scaled to length 1 again, as OpenAI does."""
    values = struct.unpack(f"<{size}f", state[: 4 * size])
    length = math.hypot(*values) or 1.0
    return struct.pack(f"<{size}f", *(value / length for value in values))
