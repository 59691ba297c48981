"""A server on the fake engine: its application alone, or on a real socket."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from kvrun.runtime.config import EngineConfig
from kvrun.runtime.text import Text
from kvrun.server.app import create_app
from kvrun.server.run import Running, bind
from kvrun.server.service import Service
from kvrun.server.settings import Settings
from tests.server.engine import FakeEngine

PATIENCE = 30.0  # seconds until a test gives up, not a time that anything should take


@dataclass
class Served:
    """One server, and somebody who talks to it."""

    service: Service
    http: httpx2.AsyncClient
    running: Running | None = None
    port: int = 0
    ended: "asyncio.Task[int] | None" = field(default=None)

    @property
    def engine(self) -> FakeEngine:
        engine: FakeEngine = self.service.client  # type: ignore[assignment]
        return engine

    async def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        return await self.http.post(path, json=body, **more)

    async def chat(self, words: str, **more: Any) -> httpx2.Response:
        body = {"messages": [{"role": "user", "content": words}], **more}
        return await self.post("/v1/chat/completions", body)

    async def generate(self, words: str, /, **parameters: Any) -> httpx2.Response:
        return await self.post("/generate", {"inputs": words, "parameters": parameters})


def events(text: str) -> list[Any]:
    """The data of a stream's events; "[DONE]" as itself."""
    found = []
    for block in text.split("\n\n"):
        if block.startswith("data: "):
            data = block.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
        else:
            assert not block or block.startswith(":"), block
    return found


@asynccontextmanager
async def served(model: Path, *, start: bool = True, **settings: Any) -> AsyncIterator[Served]:
    """The application, called directly."""
    config = EngineConfig(
        model=str(model),
        device=settings.pop("device", "auto"),
        adapters=dict(settings.get("adapters", {})),
    )
    service = Service(
        Settings(model="toy", **settings), config, open_text=Text.open, connect=FakeEngine
    )
    if start:
        await service.start()
    transport = httpx2.ASGITransport(create_app(service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield Served(service, http)
    await service.close()


@asynccontextmanager
async def listening(model: Path, **settings: Any) -> AsyncIterator[Served]:
    """The application on a socket, as `kvrun serve` runs it."""
    config = EngineConfig(
        model=str(model),
        device=settings.pop("device", "auto"),
        adapters=dict(settings.get("adapters", {})),
    )
    service = Service(
        Settings(model="toy", **settings), config, open_text=Text.open, connect=FakeEngine
    )
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    running = Running(service, sock)
    ended = asyncio.create_task(running.until_the_end())
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as http:
        server = Served(service, http, running, port, ended)
        if config.device == "auto":
            await until(lambda: service.phase == "ready")
        yield server
    if not ended.done():
        running.tell(signal.SIGTERM)
        running.tell(signal.SIGTERM)
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait({ended})


async def until(true: Callable[[], bool]) -> None:
    """Let everything else run until something is true."""
    async with asyncio.timeout(PATIENCE):
        while not true():
            await asyncio.sleep(0.001)


@pytest_asyncio.fixture
async def server(model: Path) -> AsyncIterator[Served]:
    async with served(model) as one:
        yield one


@pytest_asyncio.fixture
async def socket_server(model: Path) -> AsyncIterator[Served]:
    async with listening(model) as one:
        yield one


@pytest.fixture(autouse=True)
def forget() -> None:
    FakeEngine.made.clear()
