"""Host: the engine of this machine as the screen knows it: starting, ready, or dead and why."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

from kvrun.chat.session import Reply, Session
from kvrun.errors import KvrunError
from kvrun.runtime.engine.request import AdapterChoice, AdapterInfo, Pages, Stats
from kvrun.runtime.sampling.params import SamplingParams


class Host:
    """`connect` makes the session of another model, whose engine then begins to start.

    `changed` is called when the engine is ready, has died, or has other adapters. `gate` is set
    while questions can be asked.
    """

    def __init__(self, session: Session, connect: Callable[[str], Session]) -> None:
        self.session = session
        self.gate = asyncio.Event()
        self.failure: KvrunError | None = None
        self.adapters: dict[str, AdapterInfo] = {}
        self.changed: Callable[[], None] = lambda: None
        self._connect = connect
        self._watch: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()

    @property
    def name(self) -> str:
        return self.session.name

    @property
    def ready(self) -> bool:
        return self.gate.is_set() and self.failure is None

    async def open(self) -> None:
        """Wait until the engine can be asked. Raises what keeps it."""
        try:
            await self.session.open()
            await self.session.ready()
        except KvrunError as error:
            self.failure = error
            self.changed()
            raise
        await self._begin()

    async def close(self) -> None:
        if self._watch:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch
        await self.session.close()

    async def ask(
        self, messages: list[dict[str, str]], params: SamplingParams, adapter: AdapterChoice = None
    ) -> Reply:
        """As the session does; a dead engine is started again first."""
        if self.failure:
            await self.restart()
        return await self.session.ask_as(messages, params, adapter)

    async def restart(self) -> None:
        """Start another engine with the adapters that the dead one had."""
        async with self._lock:
            if self.failure is None:
                return
            await self.session.restart()
            await self._begin()

    async def switch(self, name: str) -> None:
        """Go on with another model. Raises before anything has changed when there is none."""
        session = self._connect(name)
        await self.close()
        self.session, self.failure, self.adapters = session, None, {}
        self.gate.clear()
        self.changed()
        await self.open()

    async def _begin(self) -> None:
        self.failure = None
        await self.refresh()
        self.gate.set()
        self._watch = asyncio.create_task(self._wait_for_end())
        self.changed()

    async def _wait_for_end(self) -> None:
        self.failure = await self.session.ended()
        self.changed()

    # -- what the engine tells --------------------------------------------------------------

    async def stats(self) -> Stats | None:
        """The counters, or None while there is no engine."""
        if not self.ready:
            return None
        with suppress(KvrunError):
            return await self.session.stats()
        return None

    async def pages(self) -> Pages | None:
        """The map of the KV cache, or None while there is no engine."""
        if not self.ready:
            return None
        with suppress(KvrunError):
            return await self.session.client.pages()
        return None

    async def refresh(self) -> None:
        """Ask which adapters the engine has, and what state they are in."""
        with suppress(KvrunError):
            found = await self.session.adapters()
            self.adapters = {info.name: info for info in found}

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Make an adapter's folder answer to a name, while others stream. Raises KvrunError."""
        info = await self.session.load_adapter(name, path)
        await self.refresh()
        self.changed()
        return info

    async def unload_adapter(self, name: str) -> None:
        """Let go of an adapter. Raises KvrunError while a request uses it."""
        await self.session.unload_adapter(name)
        await self.refresh()
        self.changed()
