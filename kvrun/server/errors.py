"""What a client is told when a request fails, in the dialect of the route it has called."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from starlette.responses import Response

from kvrun.errors import EngineDead, InvalidRequest, NotFound

RETRY_AFTER = 1  # seconds; what is running now will have moved on by then


class Kind(NamedTuple):
    """How one kind of failure is named: statuses and types, native and OpenAI's."""

    native_status: int
    openai_status: int
    native_type: str
    openai_type: str
    code: str | None = None
    prefix: str = ""  # what Text Generation Inference puts in front of the message


INVALID = "invalid_request_error"
KINDS: Mapping[str, Kind] = {
    "validation": Kind(422, 400, "validation", INVALID, None, "Input validation error: "),
    "too_long": Kind(
        422, 400, "validation", INVALID, "context_length_exceeded", "Input validation error: "
    ),
    "template": Kind(422, 400, "template_error", INVALID, None, "Template error: "),
    "tool": Kind(422, 422, "tool_error", INVALID, None, "Tool error: "),
    "malformed": Kind(400, 400, "validation", INVALID),
    "unauthorized": Kind(401, 401, "unauthorized", INVALID, "invalid_api_key"),
    "forbidden": Kind(403, 403, "forbidden", INVALID),
    "unknown_model": Kind(404, 404, "not_found", INVALID, "model_not_found"),
    "not_found": Kind(404, 404, "not_found", INVALID),
    "method": Kind(405, 405, "validation", INVALID),
    "conflict": Kind(409, 409, "conflict", INVALID),
    "slow_body": Kind(408, 408, "validation", INVALID),
    "too_large": Kind(413, 413, "validation", INVALID),
    "content_type": Kind(415, 415, "validation", INVALID),
    "headers": Kind(431, 431, "validation", INVALID),
    "overloaded": Kind(429, 429, "overloaded", "rate_limit_error", "overloaded"),
    "unavailable": Kind(503, 503, "unavailable", "service_unavailable"),
    "unhealthy": Kind(503, 503, "healthcheck", "service_unavailable"),
    "generation": Kind(
        424, 500, "generation", "server_error", None, "Request failed during generation: "
    ),
    "incomplete": Kind(500, 500, "incomplete_generation", "server_error"),
    "internal": Kind(500, 500, "internal", "server_error"),
}
BY_STATUS = {kind.openai_status: name for name, kind in reversed(list(KINDS.items()))}


class ApiError(Exception):
    """A failure with words for the client; `param` names the field that is to blame."""

    def __init__(
        self, kind: str, message: str, *, param: str | None = None, native: str | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.param = param
        self.native = native  # the native dialect's own words, where they differ

    def status(self, openai: bool) -> int:
        kind = KINDS[self.kind]
        return kind.openai_status if openai else kind.native_status

    def body(self, openai: bool, *, streamed: bool = False) -> dict[str, Any]:
        """The JSON object; in OpenAI's streams it also carries TGI's `http_status_code`."""
        kind = KINDS[self.kind]
        if not openai or self.kind == "tool":
            return {
                "error": kind.prefix + (self.native or self.message),
                "error_type": kind.native_type,
            }
        status = {"http_status_code": kind.openai_status} if streamed else {}
        return {
            "error": {
                "message": self.message,
                "type": kind.openai_type,
                "param": self.param,
                "code": kind.code,
                **status,
            }
        }

    def response(self, openai: bool) -> Response:
        headers = {}
        if self.kind in ("overloaded", "unavailable", "unhealthy"):
            headers["Retry-After"] = str(RETRY_AFTER)
        if self.kind == "unauthorized":
            headers["WWW-Authenticate"] = "Bearer"
        return json_response(self.body(openai), self.status(openai), headers)


def speaks_openai(path: str) -> bool:
    """Whether the route at `path` answers in OpenAI's dialect."""
    return path.startswith("/v1/") or path == "/v1"


def json_response(
    body: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """JSON as ASCII: some clients split lines at characters that are no line ends in JSON."""
    return Response(
        json.dumps(body, separators=(",", ":")), status, headers, media_type="application/json"
    )


def api_error(error: BaseException) -> ApiError:
    """A failure inside as what a client may hear of it."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequest):
        words = (error.what, error.cause, error.hint)
        return ApiError("validation", " ".join(part for part in words if part))
    if isinstance(error, NotFound):
        return ApiError("not_found", error.what)
    if isinstance(error, EngineDead):
        return ApiError("unavailable", "The engine has ended.")
    return ApiError("internal", "Something went wrong inside the server.")
