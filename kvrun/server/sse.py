"""Server-sent events: frames as bytes, a stream of them as a response."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvrun.server import log
from kvrun.server.call import Call
from kvrun.server.errors import ApiError, api_error
from kvrun.server.protocol import KEY as PROTOCOL
from kvrun.server.streams import Streams

DONE = b"data: [DONE]\n\n"
COMMENT = b": the server is alive\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

dumps = json.JSONEncoder(separators=(",", ":")).encode


def frame(value: Any) -> bytes:
    """One event. JSON as ASCII: some clients split lines at U+2028 and its like."""
    return f"data: {dumps(value)}\n\n".encode()


class Template:
    """Frames that differ in one text only: the rest is made once."""

    MARK = "\x00"

    def __init__(self, value: Any) -> None:
        """`value` holds Template.MARK in the place of the text."""
        before, after = frame(value).split(dumps(self.MARK).encode())
        self._before, self._after = before, after

    def fill(self, text: str) -> bytes:
        return self._before + dumps(text).encode() + self._after


class EventStream(Response):
    """The frames of `events` as a response.

    A failure before the first frame is an ordinary error response with its own status; after
    that `failed` makes its frame. One frame is under way at a time, so that a client that reads
    slowly holds up nothing but its own frames.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes],
        streams: Streams,
        *,
        call: Call,
        failed: Callable[[ApiError], bytes],
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers=headers)
        self.last = time.monotonic()
        self._events = events
        self._streams = streams
        self._call = call
        self._failed = failed
        self._busy = asyncio.Lock()
        self._started = False
        self._comments: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        # An older client is not sent chunks; a test may have no connection at all.
        self._protocol = scope.get(PROTOCOL) if scope["http_version"] == "1.1" else None
        self._streams.add(self)
        try:
            async with aclosing(self._events) as events:
                try:
                    async for data in events:
                        await self._write(data)
                except Exception as error:
                    if not self._started:
                        raise
                    known = api_error(error)
                    self._call.error = known.kind
                    if known.kind == "internal":
                        log.failure("a stream has failed unexpectedly", error)
                    await self._write(self._failed(known))
            await self._write(b"", more=False)
        finally:
            self._streams.discard(self)

    def comment(self) -> None:
        """Show that the stream is alive, unless something is being sent at the moment."""
        if not self._busy.locked():
            task = asyncio.ensure_future(self._write(COMMENT))
            self._comments.add(task)
            task.add_done_callback(self._comments.discard)

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        async with self._busy:
            if self not in self._streams:
                return  # a comment that comes too late
            self.last = time.monotonic()
            if self._started and more and self._protocol is not None:
                await self._protocol.write_chunk(data)
                return
            if not self._started:
                self._started = True
                headers = [*HEADERS, *(h for h in self.raw_headers if h[0] != b"content-length")]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": more})
            if not more:
                self._streams.discard(self)
