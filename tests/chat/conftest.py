"""The scripted engine, a model folder for it, and a session on both."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest_asyncio

from kvrun.chat.session import Session
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.text import Text


@pytest_asyncio.fixture
async def session(scripted: ModuleType, model: Path) -> AsyncIterator[Session]:
    config = EngineConfig(model=str(model))
    engine = scripted.ScriptedEngine
    async with Session("toy", config, open_text=Text.open, connect=engine) as opened:
        await opened.ready()
        yield opened
