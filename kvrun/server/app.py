"""The application: every route of the folder, who may call it, and how its errors are told."""

from importlib.metadata import version
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp

from kvrun.errors import KvrunError
from kvrun.folder import load, names
from kvrun.server import log, routes
from kvrun.server.auth import administrator, authorized
from kvrun.server.call import KEY, Call
from kvrun.server.errors import BY_STATUS, ApiError, api_error, json_response, speaks_openai
from kvrun.server.gate import Gate
from kvrun.server.schemas.common import error_schemas
from kvrun.server.service import Service

DESCRIPTION = "Text Generation Inference's API and OpenAI's, on one engine."


def create_app(service: Service) -> ASGIApp:
    """The whole ASGI application for one service."""
    app = FastAPI(
        title="kvrun",
        version=version("kvrun"),
        description=DESCRIPTION,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for name in names(routes.__name__):
        module = load(routes.__name__, name)
        if hasattr(module, "open_router"):
            app.include_router(module.open_router)
        if hasattr(module, "admin_router"):
            app.include_router(module.admin_router, dependencies=[Depends(administrator)])
            continue
        app.include_router(module.router, dependencies=[Depends(authorized)])
    _add_documents(app)
    for kind in (ApiError, KvrunError):
        app.add_exception_handler(kind, _known)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _known)
    if origins := service.settings.cors_allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id"],
        )
    return Gate(app, service)


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; made once."""
    if not app.openapi_schema:
        document = get_openapi(
            title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes
        )
        _complete(document)
        app.openapi_schema = document
    return app.openapi_schema


def _add_documents(app: FastAPI) -> None:
    hidden: dict[str, Any] = {"include_in_schema": False, "dependencies": [Depends(authorized)]}

    @app.get("/openapi.json", **hidden)
    @app.get("/api-doc/openapi.json", **hidden)
    async def document() -> Response:
        return json_response(openapi(app))

    @app.get("/docs", **hidden)
    async def page() -> HTMLResponse:
        return get_swagger_ui_html(openapi_url="/openapi.json", title="kvrun")


def _complete(document: dict[str, Any]) -> None:
    """The errors as they are: FastAPI lists its own 422 for every body."""
    for path in document["paths"].values():
        for operation in path.values():
            answers = operation["responses"]
            shown = str(answers.get("422", ""))
            if "HTTPValidationError" in shown:
                del answers["422"]
    schemas = document["components"]["schemas"]
    schemas |= error_schemas()
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)


def _answer(request: Request, error: ApiError) -> Response:
    call: Call | None = request.scope.get(KEY)
    if call:
        call.error = error.kind
    return error.response(speaks_openai(request.scope["path"]))


async def _known(request: Request, error: Exception) -> Response:
    told = api_error(error)
    if isinstance(error, KvrunError) and told.kind == "internal":
        log.failure("a request has failed", error, path=request.scope["path"][:200])
    return _answer(request, told)


async def _invalid(request: Request, error: Exception) -> Response:
    """Wrong types: the first fault, with its place and never with what was sent."""
    assert isinstance(error, RequestValidationError)
    fault = error.errors()[0]
    where = [str(part) for part in fault["loc"] if part != "body"]
    place = ".".join(where) or "the body"
    param = where[0] if where else None
    return _answer(request, ApiError("malformed", f"{place}: {fault['msg']}."[:300], param=param))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    kind = BY_STATUS.get(error.status_code, "malformed")
    words = {404: "There is no such route.", 405: "This route has other methods."}
    answer = _answer(request, ApiError(kind, words.get(error.status_code, str(error.detail))))
    for name, value in (error.headers or {}).items():
        answer.headers[name] = value
    return answer
