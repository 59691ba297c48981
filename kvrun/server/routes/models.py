"""/v1/models: what can be named in a request."""

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvrun.server.call import ReadyService
from kvrun.server.errors import ApiError, json_response
from kvrun.server.schemas.common import openai_errors
from kvrun.server.schemas.openai import ModelCard, ModelList
from kvrun.server.service import Service

router = APIRouter(prefix="/v1/models", tags=["openai"])
ERRORS = openai_errors(400, 401, 403, 404, 503)


@router.get("", response_model=ModelList, responses=openai_errors(400, 401, 403, 503))
async def models(service: ReadyService) -> Response:
    names = [*service.names, *service.adapters.names]
    return json_response({"object": "list", "data": [_card(service, name) for name in names]})


@router.get("/{model:path}", response_model=ModelCard, responses=ERRORS)
async def model(model: str, service: ReadyService) -> Response:
    if model not in service.names and model not in service.adapters:
        raise ApiError("unknown_model", "There is no such model here.", param="model")
    return json_response(_card(service, model))


def _card(service: Service, name: str) -> dict[str, Any]:
    adapter = name in service.adapters
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "kvrun",
        "root": service.adapters.root(name) if adapter else service.names[0],
        "parent": service.names[0] if adapter else None,
        "max_model_len": service.max_total_tokens,
        "permission": [],
    }
