"""Gate: what every request passes first: limits, hosts, strict JSON; and what ends it early."""

import asyncio
from collections.abc import Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvrun.server import log, strict
from kvrun.server.call import KEY, Call
from kvrun.server.errors import ApiError, api_error
from kvrun.server.service import Service
from kvrun.server.settings import LOOPBACK

MAX_HEADERS = 100
QUIET = frozenset({"/", "/health", "/healthz", "/ping", "/readyz", "/metrics"})
WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
# What the counters of requests count.
GENERATING = frozenset(
    {
        "/", "/generate", "/generate_stream", "/invocations", "/v1/completions",
        "/v1/chat/completions", "/v1/responses", "/v1/embeddings",
    }
)  # fmt: skip
# TGI's words for why a request has failed; everything else is bad input.
FAILED = {
    "overloaded": "overloaded", "generation": "generation", "incomplete": "incomplete",
    "template": "template", "unavailable": "unavailable", "internal": "internal",
}  # fmt: skip


class Gate:
    """An ASGI application around the routes.

    It reads the whole body, gives the request an id, logs it, and races it against the client:
    whoever leaves, streaming or not, has the work on his request cancelled.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._settings = service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        call = scope[KEY] = Call.of(scope)

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", call.id.encode()),
                ]
            elif not message.get("more_body"):
                call.complete = True
            await send(message)

        try:
            await self._handle(scope, receive, answer, call)
        finally:
            self._count(scope, call)
            self._log(scope, call)
            if self._service.tracing:
                self._service.tracing.record(scope, call)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, call: Call) -> None:
        try:
            self._check_head(scope)
            body = await self._read(scope, receive)
            call.received = True
            await self._check_body(scope, call, body)
        except ApiError as error:
            await _refuse(scope, receive, send, call, error)
            return
        except ConnectionResetError:
            call.gone = True
            return
        try:
            await self._race(scope, receive, send, call, body)
        except Exception as error:
            log.failure("a request has failed unexpectedly", error, id=call.id, path=call.path)
            if call.complete:
                return
            if call.status:
                raise ConnectionAbortedError("the response cannot be completed") from None
            await _refuse(scope, receive, send, call, api_error(error))

    # -- before ----------------------------------------------------------------------------

    def _check_head(self, scope: Scope) -> None:
        headers = scope["headers"]
        if len(headers) > MAX_HEADERS:
            raise ApiError("headers", f"There are {len(headers)} headers; at most {MAX_HEADERS}.")
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1:
            raise ApiError("malformed", "A request needs one Host header.")
        allowed = self._settings.allowed_hosts
        if (self._settings.local or allowed) and not _is_allowed(hosts[0], allowed):
            raise ApiError("forbidden", "This host is not served here; see --allowed-host.")
        if scope["method"] in WITH_BODY:
            self._check_origin(headers, hosts[0])

    def _check_origin(self, headers: Iterable[tuple[bytes, bytes]], host: str) -> None:
        """A page of another site must not use the server through its reader's browser."""
        origin = next((v.decode("latin-1") for name, v in headers if name == b"origin"), None)
        known = self._settings.cors_allow_origin
        if origin is None or "*" in known or origin in known:
            return
        if urlsplit(origin).netloc != host:
            raise ApiError("forbidden", "This origin is not allowed; see --cors-allow-origin.")

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        limit = self._settings.payload_limit
        declared = next((v for n, v in scope["headers"] if n == b"content-length"), b"0")
        if int(declared) > limit:
            raise ApiError("too_large", f"The body has {int(declared)} bytes; at most {limit}.")
        body = bytearray()
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ConnectionResetError
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise ApiError("too_large", f"The body has more than {limit} bytes.")
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            raise ApiError("slow_body", "The body took too long to arrive.") from None
        return bytes(body)

    async def _check_body(self, scope: Scope, call: Call, body: bytes) -> None:
        if scope["method"] not in WITH_BODY:
            return
        if not _is_json(scope):
            raise ApiError("content_type", "The body must be application/json.")
        # Whoever will be turned away for want of a place is turned away at little cost.
        if call.path in GENERATING and self._service.full:
            raise ApiError("overloaded", "Model is overloaded")
        # A large body takes as long to check as many small requests take altogether.
        if len(body) > 1 << 16:
            await self._service.in_thread(strict.check, body)
        else:
            strict.check(body)

    # -- while -----------------------------------------------------------------------------

    async def _race(
        self, scope: Scope, receive: Receive, send: Send, call: Call, body: bytes
    ) -> None:
        task = asyncio.current_task()
        assert task
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            for message in messages:
                return message
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            if not call.complete:
                call.gone = True
                task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            await self._app(scope, replay, send)
        except asyncio.CancelledError:
            if not call.gone:
                raise
            task.uncancel()
        finally:
            watcher.cancel()

    # -- after -----------------------------------------------------------------------------

    def _count(self, scope: Scope, call: Call) -> None:
        if scope["method"] != "POST" or call.path not in GENERATING:
            return
        metrics = self._service.metrics
        metrics.requests += 1
        if call.gone:
            metrics.failures["dropped"] += 1
        elif call.error or call.status != 200:
            metrics.failures[FAILED.get(call.error or "", "validation")] += 1
        else:
            metrics.succeeded += 1
            metrics.duration.observe(call.seconds)
            metrics.whole.observe(call.seconds)

    def _log(self, scope: Scope, call: Call) -> None:
        if call.path in QUIET and call.status in (200, 503):
            return
        left = {"left": True} if call.gone else {}
        log.event(
            "request",
            id=call.id,
            method=scope["method"],
            path=call.path[:200],
            status=call.status,
            ms=round(call.seconds * 1000, 1),
            **left,
            **call.notes,
        )


async def _refuse(scope: Scope, receive: Receive, send: Send, call: Call, error: ApiError) -> None:
    call.error = error.kind
    response = error.response(call.openai)
    if not call.received:
        response.headers["Connection"] = "close"  # the rest of the body is not wanted
    with suppress(OSError):
        await response(scope, receive, send)


def _is_json(scope: Scope) -> bool:
    given = next((v for name, v in scope["headers"] if name == b"content-type"), b"")
    kind = given.split(b";")[0].strip().lower()
    return kind == b"application/json" or (
        kind.startswith(b"application/") and kind.endswith(b"+json")
    )


def _is_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    """Whether a Host header names this machine, so that no other name can be made to mean it."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    local = name in LOOPBACK or name.startswith("127.") or name.endswith(".localhost")
    return local or name in allowed
