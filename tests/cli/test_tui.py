"""`kvrun tui` as a command: a terminal of its own, and where it refuses to begin."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


@pytest.fixture
def loading() -> Iterator[tuple[str, threading.Event]]:
    """A server's address; it lists no model before the event is set."""
    ready = threading.Event()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listed = {"data": [{"id": "slow-one"}]}
            words = listed if ready.is_set() else {"error": {"message": "The model is loading."}}
            self.send_response(200 if ready.is_set() else 503)
            self.end_headers()
            self.wfile.write(json.dumps(words).encode())

        def log_message(self, *_: object) -> None:
            """Nothing is told on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", ready
        server.shutdown()
        thread.join()


def test_a_server_that_loads_is_waited_for(
    screen: Start, loading: tuple[str, threading.Event]
) -> None:
    url, ready = loading
    terminal = screen("tui", "--url", url)
    terminal.expect(f"waiting for {url}, 300 s at most: The model is loading.")
    ready.set()
    until(terminal, "slow-one")
    terminal.type(CTRL_Q)
    assert terminal.wait() == 0


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
