"""The line session: questions, commands, Ctrl+C and errors, on a screen that only remembers."""

import os
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from kvrun.chat.commands import Chat
from kvrun.chat.conversation import Conversation
from kvrun.chat.repl import converse
from kvrun.chat.session import Session
from kvrun.chat.settings import Settings
from kvrun.chat.store import Store
from kvrun.errors import EngineDead
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.text import Text

CTRL_C = "ctrl-c"


class Screen:
    """Remembers. `on_write` is called with each piece of an answer."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self.notes: list[str] = []
        self.shown: list[str] = []
        self.wiped = 0
        self.on_write: Callable[[str], None] = lambda piece: None
        self._open = False

    def write(self, piece: str) -> None:
        if not self._open:
            self.answers.append("")
            self._open = True
        self.answers[-1] += piece
        self.on_write(piece)

    def end(self) -> None:
        self._open = False

    def question(self, text: str) -> None:
        self.shown.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def wipe(self) -> None:
        self.wiped += 1


class Reader:
    """Types the given lines, then Ctrl+D."""

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)

    async def read(self) -> str:
        if not self.lines:
            raise EOFError
        if (line := self.lines.pop(0)) == CTRL_C:
            raise KeyboardInterrupt
        return line

    def quiet(self) -> nullcontext[None]:
        return nullcontext()


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def chat(session: Session, tmp_path: Path) -> Chat:
    return Chat(session, Settings({}), Store(tmp_path / "chat.db"), Conversation())


def branch(chat: Chat) -> list[str]:
    return [m.content for m in chat.conversation.branch()]


async def test_questions_and_answers_build_the_conversation(chat: Chat, screen: Screen) -> None:
    await converse(chat, Reader("say one", "", "  ", "//say /two"), screen)
    assert screen.answers == ["one", "You said: /say /two"]
    assert branch(chat) == ["say one", "one", "/say /two", "You said: /say /two"]
    meta = chat.conversation.branch()[1].meta
    assert meta["completion_tokens"] == 4
    assert meta["finish_reason"] == "stop"


async def test_the_model_sees_the_turns_before(
    chat: Chat, screen: Screen, scripted: ModuleType
) -> None:
    await converse(chat, Reader("/system be brief", "say one", "say two"), screen)
    engine = scripted.ScriptedEngine.started[-1]
    prompt = chat.session.text.decode(engine.requests[-1].prompt_ids, skip_special=False)
    assert prompt == (
        "<|system|>be brief<|end|><|user|>say one<|end|><|assistant|>one<|end|>"
        "<|user|>say two<|end|><|assistant|>"
    )


async def test_regen_makes_a_sibling(chat: Chat, screen: Screen) -> None:
    await converse(chat, Reader("say one", "/regen"), screen)
    assert screen.answers == ["one", "one"]
    assert len(chat.conversation) == 3
    assert branch(chat) == ["say one", "one"]


async def test_quit_and_end_of_input_leave(chat: Chat, screen: Screen) -> None:
    reader = Reader("/bye", "say never")
    await converse(chat, reader, screen)
    assert reader.lines == ["say never"]


async def test_save_and_load_show_the_conversation_again(chat: Chat, screen: Screen) -> None:
    lines = ("say one", "/save x", "/clear", "say two", "/load x")
    await converse(chat, Reader(*lines), screen)
    assert screen.wiped == 1
    assert screen.shown == ["say one"]
    assert screen.answers == ["one", "two", "one"]
    assert branch(chat) == ["say one", "one"]


async def test_ctrl_c_stops_the_answer_and_a_second_one_leaves(
    chat: Chat, screen: Screen, scripted: ModuleType
) -> None:
    def interrupt(piece: str) -> None:
        if piece == "k":
            os.kill(os.getpid(), signal.SIGINT)

    screen.on_write = interrupt
    reader = Reader("hang", CTRL_C, "say never")
    with pytest.raises(KeyboardInterrupt):
        await converse(chat, reader, screen)
    assert screen.answers[0].startswith("Let me think")
    assert any("stopped" in note for note in screen.notes)
    assert branch(chat)[0] == "hang"
    assert chat.conversation.branch()[1].meta["finish_reason"] == "abort"
    assert scripted.ScriptedEngine.started[-1].ended_early == ["chat-1"]
    assert reader.lines == ["say never"]


async def test_after_a_stopped_answer_the_conversation_goes_on(chat: Chat, screen: Screen) -> None:
    screen.on_write = lambda piece: os.kill(os.getpid(), signal.SIGINT) if piece == "k" else None
    await converse(chat, Reader("hang", "say on"), screen)
    assert screen.answers[-1] == "on"
    assert len(branch(chat)) == 4


async def test_ctrl_c_at_the_prompt_hints_first(chat: Chat, screen: Screen) -> None:
    lines = (CTRL_C, "say one", CTRL_C, "/set top_k 3", CTRL_C, CTRL_C, "say never")
    with pytest.raises(KeyboardInterrupt):
        await converse(chat, Reader(*lines), screen)
    assert screen.answers == ["one"]
    assert sum("leaves" in note for note in screen.notes) == 3


async def test_wrong_commands_and_values_do_not_end_it(chat: Chat, screen: Screen) -> None:
    await converse(chat, Reader("/hlep", "/set temperature hot", "/load x", "say on"), screen)
    assert "/help" in screen.notes[0]
    assert "temperature is 'hot'" in screen.notes[1]
    assert "no conversation is saved as 'x'" in screen.notes[2]
    assert screen.answers == ["on"]


@pytest.mark.parametrize("question", ["break", "x" * 5000])
async def test_a_question_without_answer_does_not_stay(
    chat: Chat, screen: Screen, question: str
) -> None:
    await converse(chat, Reader("say one", question, "say two"), screen)
    assert any(note.startswith("error:") for note in screen.notes)
    assert branch(chat) == ["say one", "one", "say two", "two"]


async def test_a_failed_regen_keeps_the_first_answer(
    chat: Chat, screen: Screen, scripted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    await converse(chat, Reader("say one"), screen)
    monkeypatch.setattr(scripted.ScriptedEngine, "question", lambda self, request: "break")
    await converse(chat, Reader("/regen"), screen)
    assert branch(chat) == ["say one", "one"]
    assert len(chat.conversation) == 2


async def test_a_dead_engine_is_said_and_started_again(chat: Chat, screen: Screen) -> None:
    await converse(chat, Reader("say one", "die", "say two"), screen)
    assert any("has ended" in note for note in screen.notes)
    assert any("starts the engine again" in note for note in screen.notes)
    assert screen.answers[-1] == "two"


async def test_an_engine_that_will_not_start_again_is_an_error_each_time(
    chat: Chat, screen: Screen, scripted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(self: object) -> None:
        raise EngineDead("no memory left")

    await converse(chat, Reader("die"), screen)
    monkeypatch.setattr(scripted.ScriptedEngine, "start", refuse)
    await converse(chat, Reader("say two", "say three"), screen)
    assert sum("no memory left" in note for note in screen.notes) == 2


async def test_left_out_turns_and_cut_answers_are_never_silent(
    scripted: ModuleType, model: Path, chat: Chat, screen: Screen
) -> None:
    config = EngineConfig(model=str(model), max_model_len=80)
    engine = scripted.ScriptedEngine
    async with Session("toy", config, open_text=Text.open, connect=engine) as session:
        await session.ready()
        chat.session = session
        cut = ("/set max_tokens 2", "say abc", "/set max_tokens default", "/clear")
        lines = ("say " + "x" * 25, "say two", *cut, "say " + "y" * 60)
        await converse(chat, Reader(*lines), screen)
    notes = " ".join(screen.notes)
    assert "left out" in notes
    assert "cut after max_tokens = 2" in notes
    assert "the context is full" in screen.notes[-1]


async def test_stats_go_to_stderr(
    chat: Chat, screen: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    await converse(chat, Reader("say one"), screen, stats=True)
    captured = capsys.readouterr()
    assert "tokens/s" in captured.err
    assert "first token" in captured.err
    assert captured.out == ""
