"""EngineClient: the engine in a child process, behind async calls; owns the request queues."""

import asyncio
import itertools
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

import msgspec

from kvrun.errors import EngineDead, InvalidRequest, KvrunError
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine import wire
from kvrun.runtime.engine.request import AdapterInfo, Delta, Pages, Ready, Request, Stats

# Threads of the engine sleep while they wait for each other: spinning, they would take the cores
# from the very threads they wait for as soon as another program is busy.
PATIENT = {"OMP_WAIT_POLICY": "passive"}

_Item = Delta | KvrunError


class EngineClient:
    """Starts the engine at once, so that the caller can do other things while it loads.

    All methods belong to the event loop in which `start` was awaited. Every request gets exactly
    one end: a delta with a finish reason for each of its choices, or an exception.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        debug = bool(os.environ.get("KVRUN_DEBUG"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvrun.runtime.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else self._errors,
            env={**PATIENT, **os.environ},
            # Ctrl+C in the terminal must reach this process only.
            start_new_session=True,
        )
        assert self._process.stdin
        assert self._process.stdout
        self._outlet = self._process.stdin
        self._source = self._process.stdout
        with suppress(BrokenPipeError):
            wire.send(self._outlet, config)
        self._numbers = itertools.count()
        self._names: dict[str, str] = {}  # request id -> its name in the engine
        self._queues: dict[str, asyncio.Queue[_Item]] = {}  # by name
        self._stats: list[asyncio.Future[Stats]] = []
        self._pages: list[asyncio.Future[Pages]] = []
        self._asked: dict[int, asyncio.Future[list[AdapterInfo]]] = {}  # about adapters
        self._dead: KvrunError | None = None
        self._closing = False

    async def start(self) -> Ready:
        """Wait until the engine can take requests. Raises the engine's own error if it cannot."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[Ready] = self._loop.create_future()
        self._ended = asyncio.Event()
        threading.Thread(target=self._listen, daemon=True, name="engine-listen").start()
        return await self._started

    async def stream(self, request: Request) -> AsyncGenerator[Delta]:
        """Deltas of all choices as they come; leaving the loop early aborts the request.

        Raises InvalidRequest when the engine refuses it, EngineDead when the engine ends.
        """
        if self._dead:
            raise self._dead
        if request.id in self._names:
            raise InvalidRequest(f"a request with the id '{request.id}' is running already.")
        # In the engine every stream has a name of its own, so that an id can be used again while
        # the engine still ends the stream that had it before.
        name = str(next(self._numbers))
        body = _encode(wire.Submit(msgspec.structs.replace(request, id=name)))
        queue: asyncio.Queue[_Item] = asyncio.Queue()
        self._names[request.id], self._queues[name] = name, queue
        open_choices = request.params.n
        try:
            self._write(body)
            while open_choices:
                item = await queue.get()
                if isinstance(item, KvrunError):
                    open_choices = 0
                    raise item
                open_choices -= item.finish_reason is not None
                item.request_id = request.id
                yield item
        finally:
            del self._names[request.id], self._queues[name]
            if open_choices:
                self._write(wire.encode(wire.Abort(name)))

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its choices; each gets a last delta, with the reason "abort"."""
        if name := self._names.get(request_id):
            self._write(wire.encode(wire.Abort(name, index)))

    async def stats(self) -> Stats:
        """The engine's counters now."""
        if self._dead:
            raise self._dead
        future: asyncio.Future[Stats] = self._loop.create_future()
        self._stats.append(future)
        self._write(wire.encode(wire.AskStats()))
        return await future

    async def pages(self) -> Pages:
        """Which blocks of the KV cache belong to which of this client's requests, now."""
        if self._dead:
            raise self._dead
        future: asyncio.Future[Pages] = self._loop.create_future()
        self._pages.append(future)
        self._write(wire.encode(wire.AskPages()))
        pages = await future
        ids = {name: request_id for request_id, name in self._names.items()}
        pages.requests = {ids[n]: blocks for n, blocks in pages.requests.items() if n in ids}
        return pages

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Read the PEFT folder `path` and serve it as `name`; what streams is not held up.

        A name that is taken goes to the new adapter; requests that run keep the old one. Raises
        InvalidRequest, NotFound, BadCheckpoint or Unsupported for what cannot be served, and
        nothing has changed then.
        """
        number = next(self._numbers)
        return (await self._ask(number, wire.LoadAdapter(number, name, path)))[0]

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InvalidRequest if it is unknown or a request is using it."""
        number = next(self._numbers)
        await self._ask(number, wire.UnloadAdapter(number, name))

    async def adapters(self) -> list[AdapterInfo]:
        """The adapters that the engine knows, in the order in which they came."""
        number = next(self._numbers)
        return await self._ask(number, wire.AskAdapters(number))

    async def _ask(
        self, number: int, message: wire.LoadAdapter | wire.UnloadAdapter | wire.AskAdapters
    ) -> list[AdapterInfo]:
        if self._dead:
            raise self._dead
        body = _encode(message)
        future: asyncio.Future[list[AdapterInfo]] = self._loop.create_future()
        self._asked[number] = future
        self._write(body)
        return await future

    async def ended(self) -> KvrunError:
        """Wait until the engine process has ended, however it comes; returns why it has."""
        await self._ended.wait()
        return self._dead or EngineDead("the engine process has ended.")

    async def close(self) -> None:
        """End the engine process; what still streams gets EngineDead."""
        self._closing = True
        with suppress(OSError):
            self._outlet.close()
        if hasattr(self, "_ended"):
            await self._ended.wait()
        else:
            self._process.wait()
        self._source.close()
        self._errors.close()

    async def __aenter__(self) -> "EngineClient":
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # -- the pipe ---------------------------------------------------------------------------

    def _write(self, body: bytes) -> None:
        # A pipe that is broken or closed says nothing here: the listener tells everybody.
        with suppress(OSError, ValueError):
            wire.write(self._outlet, body)

    def _listen(self) -> None:
        """Runs in a thread: frames to the event loop, then the end of the process."""
        fault: wire.Fault | None = None
        try:
            for frame in wire.frames(self._source):
                message = wire.from_engine.decode(frame)
                if isinstance(message, wire.Died):
                    fault = message.fault
                else:
                    self._call(self._deliver, message)
        except (msgspec.MsgspecError, OSError) as error:
            # What follows cannot be understood either, and nobody may wait for it.
            fault = wire.Fault("EngineDead", "the engine's words are garbled.", str(error))
            self._process.kill()
        code = self._process.wait()
        self._call(self._end, self._obituary(code, fault))

    def _call(self, function: object, *arguments: object) -> None:
        # The loop may be gone already when a program ends without `close`.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]

    def _deliver(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Deltas):
            for delta in message.deltas:
                if queue := self._queues.get(delta.request_id):
                    queue.put_nowait(delta)
        elif isinstance(message, wire.Rejected):
            if queue := self._queues.get(message.request_id):
                queue.put_nowait(message.fault.error())
        elif isinstance(message, wire.Statistics):
            future = self._stats.pop(0)
            if not future.done():
                future.set_result(message.stats)
        elif isinstance(message, wire.PageMap):
            waiting = self._pages.pop(0)
            if not waiting.done():
                waiting.set_result(message.pages)
        elif isinstance(message, wire.Adapters | wire.Refused):
            asked = self._asked.pop(message.number)
            if not asked.done():
                if isinstance(message, wire.Refused):
                    asked.set_exception(message.fault.error())
                else:
                    asked.set_result(message.adapters)
        elif isinstance(message, wire.Started) and not self._started.done():
            self._started.set_result(message.ready)

    def _end(self, error: KvrunError) -> None:
        self._dead = error
        for queue in self._queues.values():
            queue.put_nowait(error)
        futures: list[asyncio.Future[Any]] = [
            *self._stats,
            *self._pages,
            *self._asked.values(),
        ]
        for future in futures:
            if not future.done():
                future.set_exception(error)
        if not self._started.done():
            self._started.set_exception(error)
            self._started.exception()  # nobody waits for it any more when `start` was cancelled
        self._stats.clear()
        self._pages.clear()
        self._asked.clear()
        self._ended.set()

    def _obituary(self, code: int, fault: wire.Fault | None) -> KvrunError:
        if fault:
            return fault.error()
        if self._closing:
            return EngineDead("the engine was closed.")
        how = f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        said = f"; its last words: {words[-1]}" if words else ""
        return EngineDead(
            "the engine process has ended.",
            cause=how + said,
            hint="start again; KVRUN_DEBUG=1 shows the engine's own messages",
        )


def _encode(message: wire.ToEngine) -> bytes:
    """The message as bytes that the engine can read; raises InvalidRequest for what it cannot."""
    try:
        body = wire.encode(message)
        wire.to_engine.decode(body)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise InvalidRequest("the request cannot be sent.", cause=str(error)) from error
    return body
