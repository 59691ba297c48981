"""/adapter: which adapters there are, and which one answers."""

from pathlib import Path
from types import ModuleType

import pytest

from kvrun.chat.commands import Chat, run
from kvrun.chat.conversation import Conversation
from kvrun.chat.session import Session
from kvrun.chat.settings import Settings
from kvrun.chat.store import Store
from kvrun.errors import InvalidRequest, NotFound
from kvrun.hub.local import adapters_of
from kvrun.runtime.sampling.params import SamplingParams

PIRATE = adapters_of("tiny")["pirate"]


@pytest.fixture
def chat(session: Session, tmp_path: Path) -> Chat:
    return Chat(session, Settings({}), Store(tmp_path / "chat.db"), Conversation())


async def asked(chat: Chat, scripted: ModuleType) -> str | None:
    """The adapter of the request that a question becomes."""
    reply = await chat.session.ask([{"role": "user", "content": "say hi"}], SamplingParams())
    async for _ in reply:
        pass
    adapter: str | None = scripted.ScriptedEngine.started[-1].requests[-1].adapter
    return adapter


async def test_load_use_unload(chat: Chat, scripted: ModuleType) -> None:
    assert "no adapter is loaded" in (await run(chat, "/adapter")).say
    assert await asked(chat, scripted) is None
    assert "answers from now on" in (await run(chat, f"/adapter load arr {PIRATE}")).say
    assert await asked(chat, scripted) == "arr"
    await run(chat, f"/adapter load {PIRATE}")
    assert await asked(chat, scripted) == "pirate"
    rows = (await run(chat, "/adapter list")).say.splitlines()
    assert [row.split()[:2] for row in rows] == [["arr", "rank"], ["*", "pirate"]]
    assert "350 kB" in rows[0]
    assert PIRATE in rows[0]
    await run(chat, "/adapter use arr")
    assert await asked(chat, scripted) == "arr"
    await run(chat, "/adapter use none")
    assert await asked(chat, scripted) is None
    await run(chat, "/adapter use arr")
    await run(chat, "/adapter unload arr")
    assert await asked(chat, scripted) is None
    assert chat.session.config.adapters == {"pirate": PIRATE}


async def test_an_engine_that_is_started_again_knows_them(chat: Chat, scripted: ModuleType) -> None:
    await run(chat, f"/adapter load {PIRATE}")
    chat.session._alive = False
    assert await asked(chat, scripted) == "pirate"
    assert [info.name for info in await chat.session.adapters()] == ["pirate"]


@pytest.mark.parametrize(
    ("line", "error", "words"),
    [
        ("/adapter use nothing", NotFound, "no adapter 'nothing'"),
        ("/adapter unload nothing", InvalidRequest, "no adapter 'nothing'"),
        ("/adapter load nothing", NotFound, "no adapter 'nothing'"),
        ("/adapter load x /nowhere", NotFound, "/nowhere"),
        ("/adapter use", InvalidRequest, "not what /adapter takes"),
        ("/adapter dance", InvalidRequest, "not what /adapter takes"),
        ("/adapter use a b", InvalidRequest, "not what /adapter takes"),
    ],
)
async def test_wrong_words(chat: Chat, line: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        await run(chat, line)
    assert chat.session.adapter is None
