"""What several dialects share: errors, as the document shows them, and loose strictness."""

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict

NATIVE_ERRORS = (400, 401, 403, 404, 413, 415, 422, 424, 429, 500, 503)
OPENAI_ERRORS = (400, 401, 403, 404, 413, 415, 422, 429, 500, 503)


class Body(BaseModel):
    """What a client sends: exact types, unknown fields allowed, null means the default."""

    model_config = ConfigDict(strict=True, extra="allow")


class Answer(BaseModel):
    """What the server sends."""


class NativeError(Answer):
    error: str
    error_type: str


class OpenAIErrorDetail(Answer):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(Answer):
    error: OpenAIErrorDetail


def native_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a native route: all the errors it can answer with."""
    return {status: _error(NativeError, status) for status in statuses or NATIVE_ERRORS}


def openai_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route in OpenAI's dialect."""
    return {status: _error(OpenAIError, status) for status in statuses or OPENAI_ERRORS}


def error_schemas() -> dict[str, Any]:
    """The schemas that the errors refer to. FastAPI would give them each route's own media type."""
    schemas: dict[str, Any] = {}
    for model in (NativeError, OpenAIError):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    return schemas


def _error(model: type[Answer], status: int) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {
        "description": HTTPStatus(status).phrase,
        "content": {"application/json": {"schema": schema}},
    }


def or_events(example: str) -> dict[str, Any]:
    """The 200 of a route that answers with JSON or, where asked to, with events."""
    event = {
        "type": "object",
        "properties": {"data": {"type": "string"}, "event": {"type": "string"}},
        "required": ["data"],
        "example": example,
    }
    content = {"text/event-stream": {"schema": event}}
    return {"description": "JSON, or server-sent events", "content": content}
