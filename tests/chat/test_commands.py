"""Slash commands: what each does to the chat, and what a wrong word is told."""

from pathlib import Path
from types import ModuleType

import pytest

from kvrun.chat.commands import COMMANDS, Chat, Effect, find, run
from kvrun.chat.conversation import Conversation
from kvrun.chat.session import Session
from kvrun.chat.settings import Settings
from kvrun.chat.store import Store
from kvrun.errors import InvalidRequest, KvrunError, NotFound


@pytest.fixture
def chat(session: Session, tmp_path: Path) -> Chat:
    settings = Settings({"top_k": 5})
    settings.learn({"temperature": 0.0})
    return Chat(session, settings, Store(tmp_path / "chat.db"), Conversation())


def test_names_and_aliases_are_unique_and_described() -> None:
    names = [n for c in COMMANDS for n in (c.name, *c.aliases)]
    assert len(names) == len(set(names))
    assert {"help", "system", "set", "regen", "stats", "save", "load", "clear", "quit"} <= {*names}
    assert {"?", "bye", "exit"} <= {*names}
    assert all(c.help for c in COMMANDS)


@pytest.mark.parametrize(
    ("word", "hint"),
    [("/hlep", "/help"), ("/sytem", "/system"), ("/quti", "/quit"), ("/zzz", "lists the commands")],
)
def test_an_unknown_word_gets_the_nearest_name(word: str, hint: str) -> None:
    with pytest.raises(NotFound) as error:
        find(word)
    assert word in error.value.what
    assert hint in error.value.hint


async def test_help_lists_every_command(chat: Chat) -> None:
    said = (await run(chat, "/help")).say
    assert all(f"/{c.name}" in said and c.help in said for c in COMMANDS)
    assert max(map(len, said.splitlines())) <= 80
    assert (await run(chat, "/?")).say == said
    one = (await run(chat, "/help bye")).say
    assert "/quit" in one
    assert "/bye" in one
    assert "/set" not in one


async def test_system(chat: Chat) -> None:
    assert "no system prompt" in (await run(chat, "/system")).say
    await run(chat, "/system Talk like a pirate.")
    assert chat.conversation.prompt() == [{"role": "system", "content": "Talk like a pirate."}]
    assert "pirate" in (await run(chat, "/system")).say
    await run(chat, '/system """two\nlines"""')
    assert chat.conversation.system == "two\nlines"
    await run(chat, '/system ""')
    assert chat.conversation.system == ""


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.5", "temperature", 0.5),
        ("/set temperature=0.5", "temperature", 0.5),
        ("/set top-p = 0.9", "top_p", 0.9),
        ("/set stop a=b", "stop", ("a=b",)),
        ('/set stop=["x y", "z"]', "stop", ("x y", "z")),
        ("/set seed none", "seed", None),
        ("/set top_k default", "top_k", 0),
    ],
)
async def test_set(chat: Chat, line: str, name: str, value: object) -> None:
    effect = await run(chat, line)
    assert getattr(chat.settings.params(), name) == value
    assert effect.say.startswith(name)


async def test_set_alone_shows_everything_with_its_origin(chat: Chat) -> None:
    rows = {row.split()[0]: row for row in (await run(chat, "/set")).say.splitlines()}
    assert rows["top_k"].endswith("(you)")
    assert rows["temperature"].endswith("(model)")
    assert rows["min_p"].endswith("(default)")
    one = (await run(chat, "/set top-k")).say
    assert one.splitlines()[0] == rows["top_k"]
    assert "likeliest" in one


@pytest.mark.parametrize("line", ["/set nonsense 3", "/set nonsense", "/set top_k", "/set =3"])
async def test_set_nonsense(chat: Chat, line: str) -> None:
    before = chat.settings.params()
    if line == "/set top_k":
        assert "(you)" in (await run(chat, line)).say
    else:
        with pytest.raises(InvalidRequest, match="no sampling option"):
            await run(chat, line)
    assert chat.settings.params() == before


async def test_regen_needs_a_question(chat: Chat) -> None:
    with pytest.raises(InvalidRequest, match="no question"):
        await run(chat, "/regen")
    chat.conversation.add("user", "q")
    chat.conversation.add("assistant", "a")
    assert await run(chat, "/regen") == Effect(ask=True)
    assert [m.content for m in chat.conversation.branch()] == ["q"]


async def test_save_load_clear(chat: Chat) -> None:
    chat.conversation.system = "s"
    chat.conversation.add("user", "q")
    with pytest.raises(InvalidRequest, match="no name"):
        await run(chat, "/save")
    assert "none" not in (await run(chat, "/save my talk")).say
    chat.conversation.add("assistant", "a")
    assert "'my talk' (2 messages)" in (await run(chat, "/save")).say
    effect = await run(chat, "/clear")
    assert effect.wipe
    assert (len(chat.conversation), chat.conversation.system, chat.saved_as) == (0, "s", None)
    assert "my talk" in (await run(chat, "/load")).say
    assert (await run(chat, "/load my talk")).replay
    assert [m.content for m in chat.conversation.branch()] == ["q", "a"]
    with pytest.raises(NotFound, match="'other'"):
        await run(chat, "/load other")
    assert chat.saved_as == "my talk"


async def test_stats_before_and_after_an_answer(chat: Chat) -> None:
    assert "1,234 generated" in (await run(chat, "/stats")).say
    reply = await chat.session.ask(
        [{"role": "user", "content": "say hello"}], chat.settings.params()
    )
    assert [piece async for piece in reply]
    chat.last = reply
    said = (await run(chat, "/stats")).say
    assert "tokens/s" in said
    assert "6 tokens" in said
    assert "KV 2 MB" in said


async def test_a_model_without_template_takes_no_system_prompt(
    chat: Chat, scripted: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(chat.session.text), "chat_template_known", False)
    with pytest.raises(KvrunError, match="no system prompt"):
        await run(chat, "/system x")
    assert chat.conversation.system == ""
