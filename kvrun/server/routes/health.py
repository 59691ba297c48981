"""Probes: alive, ready, healthy; what this server is."""

import os
from importlib.metadata import version as version_of
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from kvrun.server.call import AnyService, ReadyService
from kvrun.server.errors import ApiError, json_response
from kvrun.server.schemas.common import native_errors
from kvrun.server.schemas.native import Info, Version

open_router = APIRouter(tags=["health"])
router = APIRouter(tags=["health"])
UNHEALTHY = native_errors(400, 403, 503)


@open_router.get("/", responses=UNHEALTHY, status_code=200, response_class=Response)
@open_router.get("/health", responses=UNHEALTHY, response_class=Response)
@open_router.get("/ping", responses=UNHEALTHY, response_class=Response)
@open_router.get("/readyz", responses=UNHEALTHY, response_class=Response)
async def health(service: AnyService) -> Response:
    """Whether requests can be served now; not while the model loads, the server drains or
    the engine is started again."""
    if not service.healthy:
        raise ApiError("unhealthy", "unhealthy")
    return Response()


@open_router.get("/healthz", responses=UNHEALTHY, response_class=Response)
async def alive(service: AnyService) -> Response:
    """Whether the process does its work, loading and draining included."""
    if service.phase == "dead":
        raise ApiError("unhealthy", "unhealthy")
    return Response()


@router.get("/version", response_model=Version, responses=native_errors(400, 401, 403))
async def version() -> Response:
    return json_response({"version": version_of("kvrun")})


@router.get("/info", response_model=Info, responses=native_errors(400, 401, 403, 503))
async def info(service: ReadyService) -> Response:
    """What is served and what it takes; the fields of TGI 2 and 3 together."""
    settings, ready = service.settings, service.engine
    body: dict[str, Any] = {
        "model_id": service.names[0],
        "model_sha": settings.revision,
        "model_pipeline_tag": None,
        "model_dtype": f"torch.{ready.dtype}",
        "model_device_type": ready.device.split(":")[0],
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_best_of": settings.max_best_of,
        "max_stop_sequences": settings.max_stop_sequences,
        "max_input_tokens": service.max_input_tokens,
        "max_input_length": service.max_input_tokens,
        "max_total_tokens": service.max_total_tokens,
        "max_batch_total_tokens": ready.kv_tokens,
        "max_batch_size": ready.max_num_seqs,
        "max_client_batch_size": settings.max_client_batch_size,
        "max_waiting_tokens": settings.max_waiting_tokens,
        "waiting_served_ratio": settings.waiting_served_ratio,
        "validation_workers": settings.validation_workers,
        "router": "kvrun",
        "version": version_of("kvrun"),
        "sha": None,
        "docker_label": os.environ.get("DOCKER_LABEL"),
    }
    return json_response(body)
