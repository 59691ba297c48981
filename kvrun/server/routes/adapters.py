"""Adapters come and go while the server runs: vLLM's routes and kv.run's, with the admin key."""

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from kvrun.server.call import ReadyService
from kvrun.server.errors import json_response
from kvrun.server.schemas.common import Answer, Body, native_errors, openai_errors

admin_router = APIRouter(tags=["adapters"])
STATUSES = (400, 401, 403, 404, 408, 409, 413, 415, 503)
WHERE = "a name below a folder of --lora-folder, or ORG/NAME of the Hugging Face cache"


class LoadBody(Body):
    lora_name: str = Field(description="what requests will call it")
    lora_path: str = Field(description=WHERE)
    load_inplace: bool | None = Field(default=None, description="replace one of this name")


class UnloadBody(Body):
    lora_name: str


class DownloadBody(Body):
    lora_id: str = Field(description=f"{WHERE}; requests will call it so")


class Downloaded(Answer):
    lora_id: str


@admin_router.post(
    "/v1/load_lora_adapter",
    response_class=PlainTextResponse,
    responses=openai_errors(*STATUSES),
)
async def load_lora_adapter(body: LoadBody, service: ReadyService) -> Response:
    """Serve a LoRA adapter; requests that run go on with what they began with."""
    name = body.lora_name
    await service.adapters.load(name, body.lora_path, replace=bool(body.load_inplace))
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@admin_router.post(
    "/v1/unload_lora_adapter",
    response_class=PlainTextResponse,
    responses=openai_errors(*STATUSES),
)
async def unload_lora_adapter(body: UnloadBody, service: ReadyService) -> Response:
    """Serve an adapter no more; 409 while requests use it."""
    name = body.lora_name
    await service.adapters.unload(name)
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


@admin_router.post(
    "/download_lora_adapter",
    response_model=Downloaded,
    responses=native_errors(*STATUSES, 422),
)
async def download_lora_adapter(body: DownloadBody, service: ReadyService) -> Response:
    """kv.run's way to load an adapter under its own id. The server itself downloads nothing."""
    await service.adapters.load(body.lora_id, body.lora_id, replace=True)
    return json_response({"lora_id": body.lora_id})
