"""EngineClient: the engine in a child process, behind async calls; starts it anew when it dies."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import msgspec

from kvrun.errors import EngineDead, InvalidRequest, KvrunError
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine import wire
from kvrun.runtime.engine.child import Child, Garbled
from kvrun.runtime.engine.request import AdapterInfo, Delta, Pages, Ready, Request, Stats
from kvrun.runtime.engine.stream import Loaded, Stream

# Seconds after which the end of an engine counts no more as one in a row.
STEADY = 600.0

_Ask = wire.LoadAdapter | wire.UnloadAdapter | wire.AskAdapters


class EngineClient:
    """Starts the engine at once, so that the caller can do other things while it loads.

    All methods belong to the event loop in which `start` was awaited. Every request gets exactly
    one end: a delta with a finish reason for each of its choices, or an exception.

    When the process dies, up to `config.restarts` times in a row, another one is started: requests
    go on behind the last token that has come out, drawn as they would have been, and adapters are
    known again. Whoever calls meanwhile waits. `on_restart` hears why one has died, and what the
    next one says of itself once it is ready.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._child = Child(config)
        self._numbers = itertools.count()
        self._names: dict[str, str] = {}  # request id -> its name in the engine
        self._streams: dict[str, Stream] = {}  # by name
        self._stats: list[asyncio.Future[Stats]] = []
        self._pages: list[asyncio.Future[Pages]] = []
        self._asked: dict[int, tuple[_Ask, asyncio.Future[list[AdapterInfo]]]] = {}
        self._adapters = {name: Loaded(path, -1) for name, path in config.adapters.items()}
        # The engine would choose the same seeds; but another engine has to know them.
        self._random = random.Random(config.seed)
        self.on_restart: Callable[[KvrunError | Ready], None] = lambda news: None
        self._restarts = 0
        self._deaths: list[float] = []  # when, on the monotonic clock
        self._up = False  # the process that there is now takes requests
        self._dead: KvrunError | None = None
        self._closing = False

    @property
    def pid(self) -> int:
        """Of the engine process; another one after it has been started again."""
        return self._child.process.pid

    async def start(self) -> Ready:
        """Wait until the engine can take requests. Raises the engine's own error if it cannot."""
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[Ready] = self._loop.create_future()
        self._ended = asyncio.Event()
        self._listen()
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
        params = request.params
        if params.seed is None:
            params = replace(params, seed=self._random.getrandbits(63))
        named = msgspec.structs.replace(request, id=name, params=params)
        body = _encode(wire.Submit(named))
        stream = Stream(named, self._adapters)
        self._names[request.id], self._streams[name] = name, stream
        open_choices = params.n
        try:
            self._write(body)
            while open_choices:
                item = await stream.items.get()
                if isinstance(item, KvrunError):
                    open_choices = 0
                    raise item
                open_choices -= item.finish_reason is not None
                item.request_id = request.id
                yield item
        finally:
            del self._names[request.id], self._streams[name]
            if open_choices:
                self._write(wire.encode(wire.Abort(name)))

    async def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one of its choices; each gets a last delta, with the reason "abort"."""
        if name := self._names.get(request_id):
            self._streams[name].abort(index)
            self._write(wire.encode(wire.Abort(name, index)))

    async def stats(self) -> Stats:
        """The engine's counters now; a process that was started anew counts from 0."""
        if self._dead:
            raise self._dead
        future: asyncio.Future[Stats] = self._loop.create_future()
        self._stats.append(future)
        self._write(wire.encode(wire.AskStats()))
        stats = await future
        stats.restarts = self._restarts
        return stats

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

    async def _ask(self, number: int, message: _Ask) -> list[AdapterInfo]:
        if self._dead:
            raise self._dead
        body = _encode(message)
        future: asyncio.Future[list[AdapterInfo]] = self._loop.create_future()
        self._asked[number] = message, future
        self._write(body)
        return await future

    async def ended(self) -> KvrunError:
        """Wait until there is no engine any more, however it comes; returns why."""
        await self._ended.wait()
        return self._dead or EngineDead("the engine process has ended.")

    async def close(self) -> None:
        """End the engine process; what still streams gets EngineDead."""
        self._closing = True
        self._child.hang_up()
        if hasattr(self, "_ended"):
            await self._ended.wait()
        self._child.release()

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
        """Tell the engine; one that is being started is told everything once it is ready."""
        if self._up:
            self._child.write(body)

    def _listen(self) -> None:
        self._child.listen(
            lambda message: self._call(self._deliver, message),
            lambda error: self._call(self._end, error),
        )

    def _call(self, function: object, *arguments: object) -> None:
        # The loop may be gone already when a program ends without `close`.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, *arguments)  # type: ignore[arg-type]

    def _deliver(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Deltas):
            for delta in message.deltas:
                if stream := self._streams.get(delta.request_id):
                    stream.take(delta)
        elif isinstance(message, wire.Rejected):
            if stream := self._streams.get(message.request_id):
                stream.fail(message.fault.error())
        elif isinstance(message, wire.Statistics):
            _settle(self._stats.pop(0), message.stats)
        elif isinstance(message, wire.PageMap):
            _settle(self._pages.pop(0), message.pages)
        elif isinstance(message, wire.Adapters | wire.Refused):
            self._answer(message)
        elif isinstance(message, wire.Started):
            self._begin(message.ready)

    def _answer(self, message: wire.Adapters | wire.Refused) -> None:
        if message.number not in self._asked:
            return  # of an adapter that a new engine was told of
        asked, future = self._asked.pop(message.number)
        if isinstance(message, wire.Refused):
            if not future.done():
                future.set_exception(message.fault.error())
            return
        if isinstance(asked, wire.LoadAdapter):
            self._adapters[asked.name] = Loaded(asked.path, asked.number)
        elif isinstance(asked, wire.UnloadAdapter):
            self._adapters.pop(asked.name, None)
        _settle(future, message.adapters)

    # -- the process ------------------------------------------------------------------------

    def _begin(self, ready: Ready) -> None:
        """The engine takes requests: tell it all that one before it had been told."""
        self._up = True
        if self._restarts:
            for name, adapter in self._adapters.items():
                number = next(self._numbers)
                self._write(wire.encode(wire.LoadAdapter(number, name, adapter.path, lazy=True)))
        for stream in self._streams.values():
            for submit in stream.resume():
                self._write(wire.encode(submit))
        for message, _ in self._asked.values():
            self._write(wire.encode(message))
        for question in [wire.AskStats()] * len(self._stats) + [wire.AskPages()] * len(self._pages):
            self._write(wire.encode(question))
        if not self._started.done():
            self._started.set_result(ready)
        if self._restarts:
            self.on_restart(ready)

    def _end(self, error: KvrunError) -> None:
        now = time.monotonic()
        self._deaths = [*(t for t in self._deaths if now - t < STEADY), now]
        ready = self._started.done() and not self._started.cancelled()
        if ready and not (self._closing or isinstance(error, Garbled)):
            if len(self._deaths) <= self._config.restarts:
                self._restart(error)
                return
            if self._config.restarts:
                error = EngineDead(
                    error.what,
                    cause=f"{error.cause}; it had been started again {self._restarts} times",
                    hint=error.hint,
                )
        self._give_up(error)

    def _restart(self, error: KvrunError) -> None:
        self._restarts += 1
        for stream in self._streams.values():
            stream.deaths += self._up
            if lost := stream.lost(self._adapters, error):
                stream.fail(lost)
        self._up = False
        self._child.release()
        try:
            # Its adapters are told one by one: one that is gone from the disk ends only those
            # requests that want it.
            self._child = Child(replace(self._config, adapters={}))
        except OSError as failure:
            self._give_up(EngineDead(error.what, cause=f"{error.cause}; {failure}"))
            return
        self._listen()
        self.on_restart(error)

    def _give_up(self, error: KvrunError) -> None:
        self._dead = error
        for stream in self._streams.values():
            stream.fail(error)
        futures: list[asyncio.Future[Any]] = [
            *self._stats,
            *self._pages,
            *(future for _, future in self._asked.values()),
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


def _settle(future: asyncio.Future[Any], result: object) -> None:
    if not future.done():  # whoever asked may have left
        future.set_result(result)


def _encode(message: wire.ToEngine) -> bytes:
    """The message as bytes that the engine can read; raises InvalidRequest for what it cannot."""
    try:
        body = wire.encode(message)
        wire.to_engine.decode(body)
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise InvalidRequest("the request cannot be sent.", cause=str(error)) from error
    return body
