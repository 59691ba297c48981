"""Protocol: uvicorn's HTTP/1.1, which also ends connections that stand still."""

import json
import time
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from kvrun.server.settings import Settings

MAX_HEADER_BYTES = 64 << 10
KEY = "kvrun.protocol"  # its place in the ASGI scope


class Protocol(H11Protocol):
    """Ends a connection whose headers do not arrive and whose reader does not read.

    `sweep` looks after all of them, so that no event needs a timer of its own.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waits_since = time.monotonic()  # for the headers of a request
        self._stalls_since = 0.0

    def handle_events(self) -> None:
        before = self.scope
        super().handle_events()
        if self.scope is not before:
            self.scope[KEY] = self  # type: ignore[literal-required]  # its task runs later

    async def write_chunk(self, data: bytes) -> None:
        """Send a piece of a chunked body that has begun, past h11, which would cost twice as much.

        h11 keeps no account of such pieces. Waits while the client does not read.
        """
        if self.flow.write_paused and not self.cycle.disconnected:
            await self.flow.drain()
        if not self.cycle.disconnected:
            self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def data_received(self, data: bytes) -> None:
        if self.idle and not self._waits_since:
            self._waits_since = time.monotonic()
        super().data_received(data)
        if not self.idle:
            self._waits_since = 0.0

    def on_response_complete(self) -> None:
        self._waits_since = 0.0
        super().on_response_complete()

    def pause_writing(self) -> None:
        self._stalls_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stalls_since = 0.0
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """As JSON: clients read the error of every answer."""
        body = json.dumps({"error": msg, "error_type": "validation"}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    @property
    def idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def sweep(self, now: float, settings: Settings) -> None:
        """End the connection if it has stood still for too long; `now` is monotonic."""
        slow = self._waits_since and now - self._waits_since > settings.header_timeout
        stalled = self._stalls_since and now - self._stalls_since > settings.stall_timeout
        if (slow and self.idle) or stalled:
            self.transport.abort()
