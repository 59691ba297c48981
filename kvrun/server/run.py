"""Run: bind, serve while the model loads, drain when told to end."""

import asyncio
import errno
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import uvicorn

from kvrun.errors import KvrunError
from kvrun.runtime.config import EngineConfig
from kvrun.server import log
from kvrun.server.app import create_app
from kvrun.server.protocol import MAX_HEADER_BYTES, Protocol
from kvrun.server.service import Service
from kvrun.server.settings import Settings

if TYPE_CHECKING:
    from kvrun.runtime.engine.client import EngineClient
    from kvrun.runtime.text import Text

BACKLOG = 2048
# Connections taken on before anything else gets a turn. When no file descriptor is left asyncio
# tries as often in vain, and says so every time.
ACCEPTS = 16
SWEEP = 1.0  # seconds between looks at what stands still
LAST_WORDS = 1.0  # seconds for answers to reach their clients once the engine is dead


def bind(hostname: str, port: int) -> socket.socket:
    """The listening socket. Raises KvrunError when the port is in use or the host is not ours."""
    family = socket.AF_INET6 if ":" in hostname else socket.AF_INET
    # Only of a socket that says it is TCP does asyncio switch Nagle's algorithm off: without that
    # every answer of two packets waits 40 ms for the client's acknowledgement.
    sock = _Listener(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((hostname, port))
        sock.listen()  # clients that come while the weights load are answered, not refused
    except OSError as error:
        sock.close()
        raise KvrunError(
            f"port {port} on {hostname} cannot be used.",
            cause=error.strerror or str(error),
            hint="--port 0 takes any that is free"
            if error.errno in (errno.EADDRINUSE, errno.EACCES)
            else "--hostname is an address of this machine, or 0.0.0.0 for all of them",
        ) from error
    sock.setblocking(False)
    return sock


def run(
    settings: Settings,
    config: EngineConfig,
    sock: socket.socket,
    *,
    open_text: "Callable[[str], Text | None]",
    connect: "Callable[[EngineConfig], EngineClient]",
) -> int:
    """Serve until told to end; returns the exit code. Raises what kept the model or killed it."""
    handler = log.set_up(settings.json_output)

    async def main() -> int:
        service = Service(settings, config, open_text=open_text, connect=connect)
        service.log_errors = lambda: handler.errors
        return await Running(service, sock).until_the_end()

    return asyncio.run(main())


class _Listener(socket.socket):
    """A socket on which many may wait, whatever asyncio says when it begins to listen."""

    def listen(self, backlog: int = BACKLOG, /) -> None:
        super().listen(BACKLOG)


class _Server(uvicorn.Server):
    """uvicorn, whose signals are handled here."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _complain(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What asyncio has to say, as a line of the log."""
    error = context.get("exception")
    if isinstance(error, OSError):
        log.event(context["message"], logging.WARNING, cause=error.strerror or "")
    elif error is not None:
        log.failure(context["message"], error)
    else:
        log.event(context["message"], logging.WARNING)


class Running:
    """A service on its socket, from the first connection to the last."""

    def __init__(self, service: Service, sock: socket.socket) -> None:
        self._service = service
        self.socket = sock
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._server = _Server(
            uvicorn.Config(
                create_app(service),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=ACCEPTS,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=60,
                timeout_graceful_shutdown=2,
            )
        )

    def tell(self, number: int) -> None:
        """What the process is told by a signal: the first ends it well, the second at once."""
        self._signals.put_nowait(number)

    @property
    def connections(self) -> list[Protocol]:
        """Those that are open now."""
        return [c for c in self._server.server_state.connections if isinstance(c, Protocol)]

    async def until_the_end(self) -> int:
        """Serve; the exit code. Raises what kept the model from loading, or killed it."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_complain)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.tell, number)
        serving = asyncio.create_task(self._server.serve(sockets=[self.socket]))
        sweeping = asyncio.create_task(self._sweep())
        try:
            return await self._serve()
        finally:
            sweeping.cancel()
            self._server.should_exit = True
            await serving
            await self._service.close()

    async def _serve(self) -> int:
        """Load, wait for a signal or the engine's end, drain; the exit code."""
        service = self._service
        host, port = self.socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        log.event("listening", url=f"http://{shown}:{port}", model=service.names[0])
        told = asyncio.create_task(self._signals.get())
        loading = asyncio.create_task(service.start())
        try:
            await asyncio.wait({told, loading}, return_when=asyncio.FIRST_COMPLETED)
            if not told.done():
                await loading  # raises what kept it
                self._say_ready()
                dying = asyncio.create_task(service.watch())
                await asyncio.wait({told, dying}, return_when=asyncio.FIRST_COMPLETED)
                if not told.done():
                    await service.drain(LAST_WORDS)
                    raise dying.result()
                dying.cancel()
        finally:
            if not loading.done():
                loading.cancel()
                with suppress(asyncio.CancelledError, KvrunError):
                    await loading
        return await self._drain(told.result())

    async def _drain(self, number: int) -> int:
        service = self._service
        log.event("draining", active=service.active, seconds=service.settings.drain_timeout)
        draining = asyncio.create_task(service.drain(service.settings.drain_timeout))
        again = asyncio.create_task(self._signals.get())
        await asyncio.wait({draining, again}, return_when=asyncio.FIRST_COMPLETED)
        if not draining.done():
            log.event("told again: ending now", active=service.active)
            draining.cancel()
            self._server.force_exit = True
            for connection in self.connections:
                connection.transport.abort()
        again.cancel()
        stopped = draining.done() and number == signal.SIGTERM
        return 0 if stopped else 128 + number

    def _say_ready(self) -> None:
        ready = self._service.engine
        log.event(
            "ready", plan=ready.plan, device=ready.device, dtype=ready.dtype,
            seconds=round(ready.load_seconds, 2), attention=ready.attention,
        )  # fmt: skip
        if ready.attention_note:
            log.event("attention", by=ready.attention, note=ready.attention_note)
        if ready.note:
            log.event("note", text=ready.note)

    async def _sweep(self) -> None:
        settings = self._service.settings
        while True:
            await asyncio.sleep(SWEEP)
            now = time.monotonic()
            for connection in self.connections:
                connection.sweep(now, settings)
            self._service.streams.sweep(now, settings.comment_after)
