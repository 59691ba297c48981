"""/metrics: counters for Prometheus."""

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from kvrun.server.call import AnyService
from kvrun.server.metrics import CONTENT_TYPE
from kvrun.server.schemas.common import native_errors

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses=native_errors(400, 401, 403),
)
async def metrics(service: AnyService) -> Response:
    """Prometheus text: Text Generation Inference's names, vLLM's, and kvrun's own."""
    text = service.metrics.text(
        await service.stats(),
        service.engine if service.loaded else None,
        model=service.names[0],
        log_errors=service.log_errors(),
        lora=service.lora_use(),
    )
    return Response(text, headers={"content-type": CONTENT_TYPE})
