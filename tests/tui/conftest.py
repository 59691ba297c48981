"""The screen on a scripted engine: no process, no weights, every answer foreseen."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
from textual.pilot import Pilot

from kvrun.chat.history import History
from kvrun.chat.session import Session
from kvrun.chat.store import Store
from kvrun.errors import EngineDead, InvalidRequest, KvrunError, NotFound, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.request import AdapterInfo, Delta, Pages, Ready, Request, Stats
from kvrun.runtime.text import Text
from kvrun.tui.app import TuiApp
from kvrun.tui.board import Board
from kvrun.tui.column import Column
from kvrun.tui.host import Host
from kvrun.tui.talk import Speaker
from kvrun.tui.themes import Themes
from tests.chat import scripted

PATIENCE = 30.0  # seconds until a test gives up, not a time that anything should take

# Escapes of 7 and 8 bits, a title, markup, a link, and a line that reads from right to left.
EVIL = "[b]bold[/b] <think>no</think> \x1b]0;owned\x07 \x1b[31mred [x](http://b.c) \x9b7m \u202etxt"


class Engine(scripted.ScriptedEngine):
    """The line session's scripted engine with adapters, pages and a death of its own.

    "hold" begins and goes on once `go` is set; an adapter's answer names it; "attack" is answered
    with what a terminal would obey.
    """

    broken = False  # the next one cannot start

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.go = asyncio.Event()
        self.live: dict[str, Request] = {}
        self.loaded = {name: self._info(name, path) for name, path in config.adapters.items()}
        self.steps = 0
        self._death = asyncio.Event()

    async def start(self) -> Ready:
        if type(self).broken:
            raise Unsupported("the model needs 15.2 GB, 11.8 GB are free.", hint="a smaller one")
        return await super().start()

    @staticmethod
    def _info(name: str, path: str) -> AdapterInfo:
        return AdapterInfo(
            name=name, path=path, bytes=1_400_000, ranks=[8], state="device", load_seconds=0.009
        )

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        self.live[request.id] = request
        try:
            async for delta in super().stream(request):
                self.steps += 1
                yield delta
        finally:
            del self.live[request.id]

    async def _answer(self, request: Request) -> AsyncIterator[Delta]:
        question = self.question(request)
        if question == "hold":
            yield Delta(request_id=request.id, token_ids=self.text.encode("half "))
            await self.go.wait()
            end = self.text.eos_token_ids[0]
            ids = [*self.text.encode("whole"), end]
            yield Delta(request_id=request.id, token_ids=ids, finish_reason="stop")
            return
        if question == "attack":
            ids = [*self.text.encode(EVIL), self.text.eos_token_ids[0]]
            yield Delta(request_id=request.id, token_ids=ids, finish_reason="stop")
            return
        if question == "who?":
            ids = [*self.text.encode(f"I am {request.adapter}"), self.text.eos_token_ids[0]]
            yield Delta(request_id=request.id, token_ids=ids, finish_reason="stop")
            return
        try:
            async for delta in super()._answer(request):
                yield delta
        finally:
            if self.dead:
                self._death.set()

    async def stats(self) -> Stats:
        return Stats(
            running=len(self.live), blocks_total=64, blocks_active=2 * len(self.live),
            steps=self.steps, generated_tokens=self.steps, prompt_tokens=30, prefix_hit_tokens=10,
        )  # fmt: skip

    async def pages(self) -> Pages:
        """Every request holds page 1 with all others, and one of its own."""
        shared = [1] if len(self.live) > 1 else []
        requests = {name: [*shared, 2 + n] for n, name in enumerate(self.live)}
        return Pages(total=64, requests=requests, cached=[40])

    async def adapters(self) -> list[AdapterInfo]:
        return list(self.loaded.values())

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        self.loaded[name] = self._info(name, path)
        return self.loaded[name]

    async def unload_adapter(self, name: str) -> None:
        if any(request.adapter == name for request in self.live.values()):
            raise InvalidRequest(f"a request is using '{name}'.")
        del self.loaded[name]

    async def ended(self) -> KvrunError:
        await self._death.wait()
        return EngineDead("the engine process has ended.", cause="it was killed by signal 9")

    def die(self) -> None:
        """As if the process had been killed while nobody asks it."""
        self.dead = True
        self._death.set()


@dataclass
class Screen:
    """An app that runs without a terminal."""

    app: TuiApp
    pilot: Pilot[object]
    engines: list[Engine]
    patience: float = PATIENCE

    @property
    def engine(self) -> Engine:
        return self.engines[-1]

    @property
    def board(self) -> Board:
        return self.app.board

    def column(self, number: int) -> Column:
        return self.app.columns.all[number - 1]

    def lines(self) -> list[str]:
        """The screen as text, line by line."""
        strips = self.app.screen._compositor.render_strips()
        return ["".join(segment.text for segment in strip).rstrip() for strip in strips]

    def text(self) -> str:
        return "\n".join(self.lines())

    def says(self, column: int) -> str:
        """What a column shows, without marks."""
        found = self.column(column)
        ink = found._ink
        return "\n".join(s.text for e in found._entries for s in e.lines(ink)) if ink else ""

    async def until(self, true: Callable[[], object]) -> None:
        """Let the app run until something is so."""
        end = time.monotonic() + self.patience
        while not true():
            assert time.monotonic() < end, f"never: {true}\n{self.text()}"
            await self.pilot.pause(0.01)

    async def sees(self, *words: str) -> None:
        """Let the app run until all words stand on the screen."""
        await self.until(lambda: all(word in self.text() for word in words))

    async def ask(self, text: str) -> None:
        """Type a question and send it."""
        self.app.prompt.focus()
        self.app.prompt.replace_all(text)
        await self.pilot.press("enter")

    async def answered(self) -> None:
        """Let the app run until every answer is complete and on the screen."""
        await self.until(lambda: not any(talk.busy for talk in self.board.talks))
        await self.until(lambda: not any(column._live for column in self.app.columns.all))
        await self.until(
            lambda: all(
                column._ids() == [m.id for m in column.talk.conversation.branch()]
                for column in self.app.columns.all
                if column.display
            )
        )

    def notices(self) -> str:
        return "\n".join(notice.message for notice in self.app._notifications)


@pytest.fixture
def model(scripted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model with an adapter that lies beside it."""
    folder = scripted.make_model(tmp_path_factory.mktemp("toy"))
    beside = folder / "adapters" / "haiku"
    beside.mkdir(parents=True)
    (beside / "adapter_config.json").write_text("{}")
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "chat.db")


@pytest.fixture
def show(model: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Open the screen: `async with show("sql", "pirate", size=(120, 35)) as screen`."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(Engine, "broken", False)
    engines: list[Engine] = []

    def connect(name: str) -> Session:
        if name == "nowhere":
            raise NotFound("there is no model 'nowhere'.")
        config = EngineConfig(model=str(model), adapters=adapters)
        return Session(name, config, open_text=Text.open, connect=made)

    def made(config: EngineConfig) -> Engine:
        engines.append(Engine(config))
        return engines[-1]

    adapters: dict[str, str] = {}

    @asynccontextmanager
    async def opened(
        *names: str,
        size: tuple[int, int] = (120, 35),
        demo: bool = False,
        resume: bool = False,
        no_color: bool = False,
        themes: Path | None = None,
    ) -> AsyncIterator[Screen]:
        if no_color:
            monkeypatch.setenv("NO_COLOR", "1")
        adapters.update(dict.fromkeys(names, "/adapters"))
        host = Host(connect("toy"), connect)
        board = Board(host, store)
        board.add(Speaker())
        for name in names:
            board.add(Speaker(name))
        app = TuiApp(
            board, history=History(None), themes=Themes(themes),
            demo=demo, resume=resume, no_color=no_color,
        )  # fmt: skip
        async with app.run_test(size=size) as pilot:
            screen = Screen(app, pilot, engines)
            if not Engine.broken:
                await screen.until(lambda: host.ready)
                await pilot.pause()
            yield screen
            await board.settle()
        await host.close()

    return opened
