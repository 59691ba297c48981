"""Call: one HTTP request on its way through the server."""

import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.types import Scope

from kvrun.runtime.sampling.params import SamplingParams
from kvrun.server.errors import speaks_openai
from kvrun.server.service import Service

KEY = "kvrun.call"  # its place in the ASGI scope
REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Timing:
    """How one generation of a request went; times as of `time.perf_counter`, 0 for never."""

    sent: float
    first: float
    last: float
    prompt_tokens: int
    tokens: int
    params: SamplingParams
    adapter: str | None


@dataclass
class Call:
    """Its id, its dialect, and what the log will say of it; never its texts."""

    id: str
    path: str
    openai: bool
    began: float = field(default_factory=time.perf_counter)
    status: int = 0  # of the response, once it has begun
    complete: bool = False
    received: bool = False  # its whole body
    gone: bool = False  # the client has left
    error: str | None = None  # the kind of ApiError it has ended with
    notes: dict[str, Any] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)

    @classmethod
    def of(cls, scope: Scope) -> "Call":
        """A new call; the client's own request id is kept if it is a modest one."""
        given = next((v for k, v in scope["headers"] if k == b"x-request-id"), b"")
        known = REQUEST_ID.fullmatch(given)
        path = scope["path"]
        return cls(given.decode() if known else secrets.token_hex(16), path, speaks_openai(path))

    @property
    def seconds(self) -> float:
        """Since the request arrived."""
        return time.perf_counter() - self.began


# Plain functions would be run in a thread.
async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def _ready(request: Request) -> Service:
    service: Service = request.app.state.service
    service.require_ready()
    return service


async def _call(request: Request) -> Call:
    call: Call = request.scope[KEY]
    return call


# What routes ask for: the service as it is, the service with its model, and the call itself.
AnyService = Annotated[Service, Depends(_service)]
ReadyService = Annotated[Service, Depends(_ready)]
ThisCall = Annotated[Call, Depends(_call)]
