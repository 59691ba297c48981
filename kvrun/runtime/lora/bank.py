"""LoraBank: which adapters are known, which lie in memory, which on the device, who uses them."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

import torch

from kvrun.errors import BadCheckpoint, InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.device import native
from kvrun.runtime.lora.resident import Adapter, Resident
from kvrun.runtime.lora.sites import Sites
from kvrun.runtime.lora.sources import Blend, Source, open_source

# Weighted sums that are remembered although nobody uses them.
_BLENDS = 64
_READERS = 2  # threads


class Place(Enum):
    """Whether a sequence can start with its adapter."""

    READY = "ready"
    LOADING = "loading"
    FULL = "full"  # every adapter on the device is in use


@dataclass
class _Load:
    """Somebody waits for an adapter to be taken in."""

    name: str
    opening: "Future[tuple[Source, torch.Tensor, str, float]]"
    answer: "Future[Adapter]" = field(default_factory=Future)


class LoraBank:
    """Adapters on disk, in host memory and on the device, each least-recently-used first out.

    Nothing here is touched by other threads than the engine's; readers only return what they have
    read.
    """

    def __init__(
        self, sites: Sites, *, device: torch.device, dtype: torch.dtype, room: int, host_room: int
    ) -> None:
        self.sites = sites
        self.resident = Resident(sites, device=device, dtype=dtype, room=room)
        self._dtype, self._apart = dtype, device.type != "cpu"
        self._host_room = host_room
        self._names: dict[str, Adapter] = {}
        self._blends: OrderedDict[tuple[tuple[Adapter, float], ...], Adapter] = OrderedDict()
        self._hosted: OrderedDict[Adapter, None] = OrderedDict()  # least recently used first
        self._reading: set[Adapter] = set()
        self._loads: list[_Load] = []
        self._pool = ThreadPoolExecutor(_READERS, "adapter")
        self._pool.submit(native, "spread")  # compiled now, if ever, not while somebody waits

    # -- names ------------------------------------------------------------------------------

    def register(self, name: str, path: str) -> None:
        """Know an adapter by its headers; its matrices are read when they are wanted.

        Raises NotFound, BadCheckpoint or Unsupported.
        """
        self._names[_checked(name)] = self._new(name, open_source(path, self.sites))

    def load(self, name: str, path: str) -> "Future[Adapter]":
        """Read an adapter whole, in another thread; `poll` takes it in and completes the future,
        with a KvrunError if it cannot be served. The name stays as it was until then."""

        def opened() -> tuple[Source, torch.Tensor, str, float]:
            begun = time.perf_counter()
            source = open_source(path, self.sites)
            self._refuse_large(source)
            flat, identity = source.read(self._dtype)
            return source, flat, identity, time.perf_counter() - begun

        try:
            load = _Load(_checked(name), self._pool.submit(opened))
        except KvrunError as error:
            failed: Future[Adapter] = Future()
            failed.set_exception(error)
            return failed
        self._loads.append(load)
        return load.answer

    def unload(self, name: str) -> None:
        """Forget an adapter. Raises InvalidRequest if it is unknown or in use."""
        adapter = self._known(name)
        if adapter.users:
            raise InvalidRequest(
                f"the adapter '{name}' is in use by {adapter.users} running requests.",
                hint="unload it when they have ended",
            )
        del self._names[name]
        self._retire(adapter)

    @property
    def adapters(self) -> list[Adapter]:
        """Those that have a name, in the order in which they came."""
        return list(self._names.values())

    def find(self, choice: str | Sequence[tuple[str, float]] | None) -> Adapter | None:
        """What a request asks for. Raises InvalidRequest, naming what there is."""
        if choice is None:
            return None
        if isinstance(choice, str):
            return self._known(choice)
        if not choice:
            raise InvalidRequest("the list of adapters is empty.", hint="leave it out")
        parts = tuple((self._known(name), float(weight)) for name, weight in choice)
        if len(parts) == 1 and parts[0][1] == 1.0:
            return parts[0][0]
        if parts not in self._blends:
            name = " + ".join(f"{weight:g} {adapter.name}" for adapter, weight in parts)
            sources = [(adapter.source, weight) for adapter, weight in parts]
            blend = Blend(sources, name, self.sites)
            self._blends[parts] = self._new(name, blend, parts=tuple(a for a, _ in parts))
            self._forget_blends()
        self._blends.move_to_end(parts)
        return self._blends[parts]

    def _known(self, name: str) -> Adapter:
        if name not in self._names:
            known = ", ".join(self._names)
            raise InvalidRequest(
                f"there is no adapter '{name[:96]}'.",
                hint=f"known: {known[:400]}" if known else "none is loaded",
            )
        return self._names[name]

    def _new(self, name: str, source: Source, **state: Any) -> Adapter:
        self._refuse_large(source)
        return Adapter(name, source, source.layout.size * self._dtype.itemsize, **state)

    def _refuse_large(self, source: Source) -> None:
        if source.layout.size > self.resident.room:
            size = self._dtype.itemsize
            raise Unsupported(
                f"the adapter {source.path} takes {source.layout.size * size:,} bytes; the engine "
                f"has {self.resident.room * size:,} for adapters.",
                hint="start it with a larger lora_memory",
            )

    # -- use --------------------------------------------------------------------------------

    def claim(self, adapter: Adapter) -> None:
        """A sequence will need it; until `release`, its content is what the sequence gets."""
        for one in (adapter, *adapter.parts):
            one.users += 1

    def release(self, adapter: Adapter, pinned: bool) -> None:
        """The sequence has ended, and no open ticket names it any more."""
        adapter.pins -= pinned
        for one in (adapter, *adapter.parts):
            one.users -= 1
            if one.retired and not one.users:
                self._retire(one)

    def place(self, adapter: Adapter, pinned: bool) -> Place:
        """Bring an adapter to the device, a step further with every call.

        Unless the answer is FULL or the adapter has still to be read, it is pinned: `adapter.slot`
        is there, and stays until `release`. Raises the KvrunError for which it cannot be read.
        """
        self._touch(adapter)
        if not adapter.slot:
            if adapter.error:
                raise adapter.error
            if adapter.host is None:
                self._read(adapter)
                return Place.LOADING
            if not self.resident.take_in(adapter):
                return Place.FULL
            if not self._apart:
                self._drop(adapter)  # on CPU a second copy is of no use
        arrived = adapter.landed is None or adapter.landed.query()
        adapter.pins += not pinned
        return Place.READY if arrived else Place.LOADING

    @property
    def loading(self) -> bool:
        """Whether an adapter is on its way, so that `wait` has something to wait for."""
        return bool(self._reading or self._loads or self.resident.underway)

    def wait(self, seconds: float) -> None:
        """Wait until something has come a step further, or until the time is over."""
        futures = [cast("Future[object]", a.reading) for a in self._reading]
        futures += [cast("Future[object]", load.opening) for load in self._loads]
        futures += [cast("Future[object]", sent) for sent in self.resident.underway]
        wait(futures, seconds, FIRST_COMPLETED)

    def poll(self) -> None:
        """Take in what the readers have read."""
        for adapter in [a for a in self._reading if a.reading and a.reading.done()]:
            self._reading.discard(adapter)
            self._take_in(adapter)
        for load in [load for load in self._loads if load.opening.done()]:
            self._loads.remove(load)
            self._answer(load)

    def _take_in(self, adapter: Adapter) -> None:
        reading, adapter.reading = adapter.reading, None
        assert reading is not None
        try:
            flat, identity, seconds = reading.result()
            if adapter.identity not in (None, identity):
                raise BadCheckpoint(
                    f"the files of the adapter '{adapter.name}' are others than when it was read "
                    "first.",
                    hint="load it again",
                )
        except KvrunError as error:
            adapter.error = error
            return
        except Exception as error:
            adapter.error = BadCheckpoint(
                f"the adapter '{adapter.name}' cannot be read.", cause=f"{error}"
            )
            return
        adapter.identity, adapter.load_seconds = identity, seconds
        self._host(adapter, flat)

    def _answer(self, load: _Load) -> None:
        try:
            source, flat, identity, seconds = load.opening.result()
        except KvrunError as error:
            load.answer.set_exception(error)
            return
        except Exception as error:
            what = f"the adapter '{load.name}' cannot be read."
            load.answer.set_exception(BadCheckpoint(what, cause=f"{error}"))
            return
        adapter = self._new(load.name, source, identity=identity, load_seconds=seconds)
        old = self._names.get(load.name)
        self._names[load.name] = adapter
        if old is not None:
            self._retire(old)
        self._host(adapter, flat)
        load.answer.set_result(adapter)

    # -- memory -----------------------------------------------------------------------------

    def _read(self, adapter: Adapter) -> None:
        if adapter.reading is not None:
            return

        def read() -> tuple[torch.Tensor, str, float]:
            begun = time.perf_counter()
            flat, identity = adapter.source.read(self._dtype)
            return flat, identity, time.perf_counter() - begun

        adapter.reading = self._pool.submit(read)
        self._reading.add(adapter)

    def _host(self, adapter: Adapter, flat: torch.Tensor) -> None:
        adapter.host = flat
        self._hosted[adapter] = None
        used = sum(a.host.nbytes for a in self._hosted if a.host is not None)
        for old in list(self._hosted):
            if used <= self._host_room:
                break
            if old is not adapter and old.host is not None:
                used -= old.host.nbytes
                self._drop(old)

    def _drop(self, adapter: Adapter) -> None:
        adapter.host = None
        self._hosted.pop(adapter, None)

    def _touch(self, adapter: Adapter) -> None:
        self.resident.touch(adapter)
        if adapter in self._hosted:
            self._hosted.move_to_end(adapter)

    def _retire(self, adapter: Adapter) -> None:
        """Give an adapter's memory back, now or when its last user has gone."""
        adapter.retired = True
        for parts in [p for p, b in self._blends.items() if adapter in b.parts and not b.retired]:
            self._retire(self._blends.pop(parts))
        if not adapter.users:
            self._drop(adapter)
            if adapter.slot:
                self.resident.evict(adapter)

    def _forget_blends(self) -> None:
        idle = [p for p, blend in self._blends.items() if not blend.users][:-1]
        for parts in idle[: max(0, len(self._blends) - _BLENDS)]:
            self._retire(self._blends.pop(parts))


def _checked(name: str) -> str:
    if not name or len(name) > 200 or not name.isprintable():
        raise InvalidRequest(f"{name[:40]!r} is no name for an adapter.", hint="letters and digits")
    return name
