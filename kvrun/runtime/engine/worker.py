"""The engine process: requests from stdin, deltas to stdout, until stdin ends.

Started by EngineClient as `python -m kvrun.runtime.engine.worker`. It ends by itself when its
parent does (stdin ends), when the engine gives up, and when one step takes longer than
`step_timeout`.
"""

import faulthandler
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import IO

import msgspec

from kvrun.errors import EngineDead, InvalidRequest, KvrunError
from kvrun.folder import load
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine import wire
from kvrun.runtime.engine.engine import Engine, describe
from kvrun.runtime.engine.request import AdapterInfo

DEAD = EngineDead.exit_code


class _Watchdog(threading.Thread):
    """Ends the process when a step hangs: nothing can interrupt a stuck kernel.

    Native code that never gives the interpreter back stops this thread too; then a timer that it
    keeps pushing back runs out, and the process ends all the same.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__(daemon=True, name="watchdog")
        self._timeout = timeout
        self._deadline: float | None = None
        self._push_back()

    def begin(self) -> None:
        self._deadline = time.monotonic() + self._timeout

    def end(self) -> None:
        self._deadline = None

    def _push_back(self) -> None:
        faulthandler.dump_traceback_later(self._timeout + 1, exit=True)

    def run(self) -> None:
        pause = threading.Event()
        while not pause.wait(min(1.0, self._timeout / 4)):
            self._push_back()
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
                print(f"a step has taken longer than {self._timeout:g} s", file=sys.stderr)
                sys.stderr.flush()
                os._exit(DEAD)


# Set once the engine has given up: a parent that hears of it may hang up before the process ends.
_dying = threading.Event()
_Inbox = SimpleQueue[wire.ToEngine | Exception]


def _listen(pipe: IO[bytes], inbox: _Inbox) -> None:
    for frame in wire.frames(pipe):
        try:
            inbox.put(wire.to_engine.decode(frame))
        except Exception as error:  # raised again by the main thread, which can report it
            inbox.put(error)
    if not _dying.is_set():
        os._exit(0)  # the parent has gone; whatever is being computed is for nobody


class Worker:
    """Feeds messages to the engine between steps, and sends what the steps bring."""

    def __init__(self, engine: Engine, outlet: IO[bytes], inbox: _Inbox) -> None:
        self._engine = engine
        self._outlet = outlet
        self._inbox = inbox
        self._loading: dict[int, Future[AdapterInfo]] = {}  # by the number of who asked

    def run(self, watchdog: _Watchdog) -> None:
        """Step while there is work, wait for a message while there is none."""
        while True:
            self._take_in()
            watchdog.begin()
            deltas = self._engine.step()
            watchdog.end()
            if deltas:
                wire.send(self._outlet, wire.Deltas(deltas))
            for number, future in list(self._loading.items()):
                if future.done():
                    del self._loading[number]
                    self._answer(number, partial(_alone, future))

    def _take_in(self) -> None:
        if self._engine.idle:
            self._handle(self._inbox.get())
        while True:
            try:
                self._handle(self._inbox.get_nowait())
            except Empty:
                return

    def _handle(self, message: wire.ToEngine | Exception) -> None:
        if isinstance(message, Exception):
            raise message
        if isinstance(message, wire.Submit):
            try:
                self._engine.add(message.request, message.known)
            except InvalidRequest as error:
                rejected = wire.Rejected(message.request.id, wire.Fault.of(error))
                wire.send(self._outlet, rejected)
        elif isinstance(message, wire.Abort):
            self._engine.abort(message.request_id, message.index)
        elif isinstance(message, wire.AskPages):
            wire.send(self._outlet, wire.PageMap(self._engine.pages()))
        elif isinstance(message, wire.LoadAdapter):
            name, path = message.name, message.path
            if message.lazy:
                self._answer(message.number, lambda: self._engine.register_adapter(name, path))
            else:
                self._loading[message.number] = self._engine.load_adapter(name, path)
        elif isinstance(message, wire.UnloadAdapter):
            name = message.name
            self._answer(message.number, lambda: self._engine.unload_adapter(name))
        elif isinstance(message, wire.AskAdapters):
            self._answer(message.number, self._engine.adapters)
        else:
            wire.send(self._outlet, wire.Statistics(self._engine.stats()))

    def _answer(self, number: int, ask: Callable[[], list[AdapterInfo] | None]) -> None:
        try:
            answer: wire.FromEngine = wire.Adapters(number, ask() or [])
        except KvrunError as error:
            answer = wire.Refused(number, wire.Fault.of(error))
        wire.send(self._outlet, answer)


def _alone(future: "Future[AdapterInfo]") -> list[AdapterInfo]:
    return [future.result()]


def main() -> None:
    # Ctrl+C is for the process that talks to the user; this one ends with its parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever else is printed in this process must not get between the frames.
    outlet = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    source = sys.stdin.buffer
    first = next(wire.frames(source), None)
    if first is None:
        return
    inbox: _Inbox = SimpleQueue()
    threading.Thread(target=_listen, args=(source, inbox), daemon=True, name="listen").start()
    try:
        config = msgspec.msgpack.decode(first, type=EngineConfig)
        engine = load("kvrun.runtime.engine", "start").start(config)
        watchdog = _Watchdog(config.step_timeout)
        watchdog.start()
        wire.send(outlet, wire.Started(engine.ready))
        # A full collection goes through everything imported, and every step would wait for it.
        gc.freeze()
        Worker(engine, outlet, inbox).run(watchdog)
    except KvrunError as error:
        _die(outlet, wire.Fault.of(error))
    except Exception as error:
        faulthandler.dump_traceback(file=sys.stderr)
        _die(outlet, wire.Fault("EngineDead", "the engine has failed.", describe(error)))


def _die(outlet: IO[bytes], fault: wire.Fault) -> None:
    _dying.set()
    wire.send(outlet, wire.Died(fault))
    outlet.close()
    sys.stderr.flush()
    os._exit(DEAD)  # without waiting for threads that sit in reads


if __name__ == "__main__":
    main()
