"""A home of its own for every test, the built-in model measured once, and the scripted server."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from kvrun.bench import hardware
from kvrun.bench.hardware import Hardware
from kvrun.bench.target import Target, find
from tests.bench.stub import Stub


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing that was measured before takes part."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def measured(home: Path) -> Hardware:
    """The ceilings of this machine by very small arrays, kept where commands look for them."""
    return hardware.measured("cpu", quick=True, scale=0.002)


@pytest.fixture(scope="session")
def tiny() -> Iterator[Target]:
    """The built-in model, with room for four short sequences."""
    with (
        find("tiny", None) as model,
        Target(
            model, device="cpu", prefix_caching=False, max_model_len=64, max_num_seqs=4
        ) as target,
    ):
        yield target


@pytest.fixture
async def stub() -> AsyncIterator[Stub]:
    async with Stub() as server:
        server.answers("a", "b", "c", usage=3)
        yield server
