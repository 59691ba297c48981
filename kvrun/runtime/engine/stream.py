"""Stream: one request on its way through the engine, as far as its client has heard of it."""

import asyncio
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from kvrun.errors import EngineDead, KvrunError
from kvrun.runtime.engine import wire
from kvrun.runtime.engine.request import Delta, Request

# A request that was there so often when an engine died is not handed to another one: it may be
# what kills them.
MAX_DEATHS = 3


class Loaded(NamedTuple):
    """An adapter behind a name; `load` tells two that had the name after each other apart."""

    path: str
    load: int


class Stream:
    """What has come of each choice, so that another engine can go on where one has died.

    `request` bears the name it has in the engine, and a seed: what is drawn next depends on
    nothing that only the engine knew.
    """

    def __init__(self, request: Request, loaded: Mapping[str, Loaded]) -> None:
        self.request = request
        self.items: asyncio.Queue[Delta | KvrunError] = asyncio.Queue()
        self.deaths = 0
        self._known: dict[int, list[int]] = {index: [] for index in range(request.params.n)}
        self._aborted: set[int] = set()
        self._adapters = {name: loaded.get(name) for name in _names(request)}

    def take(self, delta: Delta) -> None:
        """Hand on what the engine says of it."""
        if delta.finish_reason:
            self._known.pop(delta.index, None)
        elif delta.index in self._known:
            self._known[delta.index] += delta.token_ids
        self.items.put_nowait(delta)

    def fail(self, error: KvrunError) -> None:
        """End it for good."""
        self._known.clear()
        self.items.put_nowait(error)

    def abort(self, index: int | None) -> None:
        """Remember what the engine is being told."""
        self._aborted |= set(self._known) if index is None else {index}

    def lost(self, loaded: Mapping[str, Loaded], error: KvrunError) -> KvrunError | None:
        """Why no other engine can go on with it, now that one has died of `error`."""
        if self.deaths >= MAX_DEATHS:
            times = f"the engine has ended {self.deaths} times while it computed this request"
            return EngineDead(f"{times}.", cause=error.cause or error.what)
        for name, adapter in self._adapters.items():
            if adapter is not None and loaded.get(name) != adapter:
                return EngineDead(
                    "the engine has ended, and the answer cannot go on.",
                    cause=f"the adapter '{name}' is another one than when it began",
                )
        return None

    def resume(self) -> Iterator[wire.Submit]:
        """End what was aborted meanwhile; what another engine has to be told, if anything."""
        for index in sorted(self._aborted & set(self._known)):
            self.take(Delta(request_id=self.request.id, index=index, finish_reason="abort"))
        if self._known:
            yield wire.Submit(self.request, self._known)


def _names(request: Request) -> list[str]:
    choice = request.adapter
    if choice is None or isinstance(choice, str):
        return [choice] if choice else []
    return [name for name, _ in choice]
