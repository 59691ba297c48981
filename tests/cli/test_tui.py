"""`kvrun tui` as a command: a terminal of its own, and where it refuses to begin."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Result, Terminal

Start = Callable[..., Terminal]
CTRL_Q = "\x11"


@pytest.fixture
def screen() -> Iterator[Start]:
    """Start `kvrun WORDS` in a terminal, on the real engine."""
    opened = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal(["-m", "kvrun", *words], size=(30, 100)))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def until(screen: Terminal, pattern: str) -> None:
    """Read on until something was drawn; Textual draws a line in several pieces."""
    while not re.search(pattern, screen.seen):
        assert screen._read(), f"ended without {pattern!r}: {screen.seen[-500:]!r}"


def test_a_question_is_answered_and_the_terminal_left_as_it_was(screen: Start, home: Path) -> None:
    terminal = screen("tui", "--threads", "1")
    until(terminal, "prompt → all")
    terminal.type("What is the capital of France?\r")
    until(terminal, r"\d+t \d+/s .*stop")
    terminal.type(CTRL_Q)
    assert terminal.wait() == 0
    assert "Traceback" not in terminal.seen
    assert terminal.restored()
    assert (home / "state" / "kvrun" / "conversations.db").exists()


def test_the_engines_own_message_and_no_traceback(screen: Start) -> None:
    terminal = screen("tui", "--max-model-len", "999999")
    assert terminal.wait() == 4
    assert "the model was made for" in terminal.seen
    assert "Traceback" not in terminal.seen
    assert terminal.restored()


def test_a_dumb_terminal_is_told_of_chat(screen: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = screen("tui")
    assert terminal.wait() == 2
    assert "kvrun chat --plain" in terminal.seen


def test_without_a_terminal_chat_is_named(kvrun_command: Callable[..., Result]) -> None:
    result = kvrun_command("tui")
    assert result.code == 2
    assert "needs a terminal" in result.err
    assert "kvrun chat" in result.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("./nowhere/model",), 3, "there is no folder"),
        (("--adapter", "sqll"), 3, "there is no adapter 'sqll'"),
        (("-o", "temperatur=1"), 2, "did you mean 'temperature'?"),
        (("-t", "-1"), 2, "temperature is -1"),
        (("--quantize", "gptq"), 2, "leave it out"),
        (("--url", "ftp://x"), 2, "is no URL"),
        (("--url", "http://127.0.0.1:1"), 5, "no answer from"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(
    screen: Start, words: tuple[str, ...], code: int, said: str
) -> None:
    terminal = screen("tui", *words)
    assert terminal.wait() == code
    assert said in terminal.seen.replace("\r\n", " ")
    assert "\x1b[?1049h" not in terminal.seen  # no screen was opened


@pytest.mark.parametrize(
    "words", [("--adapter", "sql", "--adapter", "json"), ("--tui", "--adapter", "sql")]
)
def test_chat_opens_columns(screen: Start, words: tuple[str, ...]) -> None:
    terminal = screen("chat", "--threads", "1", *words)
    until(terminal, "1 base")
    until(terminal, "2 sql")
    assert ("3 json" in terminal.seen) is ("json" in words)
    terminal.type(CTRL_Q)
    assert terminal.wait() == 0
    assert terminal.restored()


def test_plain_chat_stays_a_line_session(screen: Start) -> None:
    terminal = screen("chat", "--threads", "1", "--plain", "--adapter", "sql", "--adapter", "json")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.wait() == 0
    assert "\x1b[?1049h" not in terminal.seen


def test_tui_contradicts_a_prompt(kvrun_command: Callable[..., Result]) -> None:
    result = kvrun_command("chat", "--tui", "hello")
    assert result.code == 2
    assert "--tui takes no prompt" in result.err
