"""The scripted engine, a model folder for it, and a session on both."""

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest
import pytest_asyncio

from kvrun.chat.session import Session
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.text import Text


@pytest.fixture(scope="session")
def scripted() -> ModuleType:
    """The module beside this file: tests are no package, so it has no name to import."""
    spec = importlib.util.spec_from_file_location("scripted", Path(__file__).parent / "scripted.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model(scripted: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted.make_model(tmp_path_factory.mktemp("model"))


@pytest_asyncio.fixture
async def session(scripted: ModuleType, model: Path) -> AsyncIterator[Session]:
    config = EngineConfig(model=str(model))
    engine = scripted.ScriptedEngine
    async with Session("toy", config, open_text=Text.open, connect=engine) as opened:
        await opened.ready()
        yield opened
