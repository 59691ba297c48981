"""kvrun chat in a terminal: streaming, editing, and row S4 of the fault matrix (Ctrl+C)."""

import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., "Terminal"]  # noqa: F821 (of conftest)
CTRL_C, CTRL_D, CTRL_J = "\x03", "\x04", "\n"
ALT_ENTER = "\x1b\r"


@pytest.fixture(params=["editor", "plain"])
def style(request: pytest.FixtureRequest) -> list[str]:
    return ["--plain"] if request.param == "plain" else []


def test_s4_the_first_interrupt_stops_the_reply_and_the_second_leaves(
    terminal: Start, style: list[str]
) -> None:
    screen = terminal(*style)
    screen.expect("> ")
    screen.type("hang\r" if not style else "hang\n")
    screen.expect("Let me think")
    screen.type(CTRL_C)
    screen.expect("stopped")
    screen.expect("> ")
    screen.type(CTRL_C)
    assert screen.wait() == 130
    assert screen.restored()


def test_s4_a_stopped_reply_does_not_end_the_conversation(
    terminal: Start, style: list[str]
) -> None:
    enter = "\n" if style else "\r"
    screen = terminal(*style)
    screen.expect("> ")
    screen.type("hang" + enter)
    screen.expect("Let me think")
    screen.signal(signal.SIGINT)  # from outside is the same as from the keyboard
    screen.expect("stopped")
    screen.expect("> ")
    screen.type("say again" + enter)
    screen.expect("again")
    screen.expect("> ")
    screen.type(CTRL_C)
    screen.expect("Ctrl+D leaves")
    screen.expect("> ")
    screen.type(CTRL_D)
    assert screen.wait() == 0
    assert screen.restored()


def test_s4_one_answer_is_stopped_with_130(terminal: Start, style: list[str]) -> None:
    screen = terminal(*style, "hang")
    screen.expect("Let me think")
    screen.type(CTRL_C)
    assert screen.wait() == 130
    assert "Traceback" not in screen.seen
    assert screen.restored()


def test_being_terminated_puts_the_terminal_right(terminal: Start, style: list[str]) -> None:
    screen = terminal(*style)
    screen.expect("> ")
    screen.signal(signal.SIGTERM)
    assert screen.wait() == (-signal.SIGTERM if style else 128 + signal.SIGTERM)
    assert screen.restored()


def test_what_is_typed_while_an_answer_comes_waits(terminal: Start) -> None:
    screen = terminal()
    screen.expect("> ")
    screen.type("hang\r")
    screen.expect("think")
    screen.type("invisible")
    screen.signal(signal.SIGINT)
    before = screen.expect("stopped")
    assert "invisible" not in before
    screen.expect("invisible")  # on the prompt, to be edited
    screen.type(CTRL_C)
    screen.type(CTRL_D)
    assert screen.wait() == 0


@pytest.mark.parametrize(
    "keys",
    [
        f"say one{CTRL_J}two\r",
        f"say one{ALT_ENTER}two\r",
        '"""say one\rtwo"""\r',
        "\x1b[200~say one\ntwo\x1b[201~\r",  # a paste does not send itself
    ],
)
def test_several_lines(terminal: Start, keys: str) -> None:
    screen = terminal()
    screen.expect("> ")
    screen.type(keys)
    screen.expect("one\ntwo\n")
    screen.type("/quit\r")
    assert screen.wait() == 0


def test_markdown_is_rendered_and_codes_of_the_model_are_not(terminal: Start) -> None:
    screen = terminal()
    screen.expect("> ")
    screen.type("\x1b[200~say **strong** \x1b]0;owned\x07 [b]x[/b] <i>\x1b[201~\r")
    screen.expect("strong ]0;owned [b]x[/b] <i>")
    screen.type(CTRL_D)
    screen.wait()


def test_history_is_kept_for_its_owner_alone(terminal: Start, home: Path) -> None:
    screen = terminal()
    screen.expect("> ")
    screen.type("say first\r")
    screen.expect("first\n")
    screen.type(CTRL_D)
    assert screen.wait() == 0
    history = home / "state" / "kvrun" / "history"
    assert "say first" in history.read_text()
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    screen = terminal()
    screen.expect("> ")
    screen.type("\x1b[A")
    screen.expect("say first")
    screen.type(CTRL_C + CTRL_D)
    assert screen.wait() == 0


def test_history_that_cannot_be_written_is_said_and_no_obstacle(
    terminal: Start, home: Path
) -> None:
    (home / "state").write_text("a file where a folder should be")
    screen = terminal()
    screen.expect("history is not kept")
    screen.expect("> ")
    screen.type("say on\r")
    screen.expect("on\n")
    screen.type("/save x\r")
    screen.expect("cannot be used")
    screen.type(CTRL_D)
    assert screen.wait() == 0


def test_commands_complete(terminal: Start) -> None:
    screen = terminal()
    screen.expect("> ")
    screen.type("/set temp")
    screen.expect("temperature")
    screen.type(CTRL_C + CTRL_D)
    assert screen.wait() == 0


@pytest.mark.parametrize(
    ("variable", "value", "coloured"),
    [("NO_COLOR", "1", False), ("CLICOLOR", "0", False), ("NO_COLOR", "", True)],
)
def test_no_colour(
    terminal: Start, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, coloured: bool
) -> None:
    monkeypatch.setenv(variable, value)
    screen = terminal("say # `code` [a](http://b)\n\n```python\nimport os\n```")
    assert screen.wait() == 0
    codes = ";".join(re.findall(r"\x1b\[([\d;]*)m", screen.seen)).split(";")
    assert any(int(code or 0) >= 30 for code in codes) is coloured


def test_a_dumb_terminal_gets_no_codes_at_all(
    terminal: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    screen = terminal()
    screen.expect("> ")
    screen.type("say **x**\n")
    screen.expect("\n**x**\n")
    screen.type(CTRL_D)
    assert screen.wait() == 0
    assert "\x1b" not in screen.seen


def test_json_needs_a_prompt(terminal: Start) -> None:
    screen = terminal("--json")
    assert screen.wait() == 2
    assert "--json needs a prompt" in screen.seen


def test_the_engine_going_away_is_said(terminal: Start) -> None:
    screen = terminal()
    screen.expect("> ")
    screen.type("die\r")
    screen.expect("the engine process has ended")
    screen.type("say back\r")
    screen.expect("back\n")
    screen.type(CTRL_D)
    assert screen.wait() == 0


def test_stdin_can_be_typed(terminal: Start) -> None:
    screen = terminal("-")
    screen.expect("Ctrl+D on an empty line")
    screen.type("say typed\n" + CTRL_D)
    assert screen.wait() == 0
    assert screen.seen.endswith("\ntyped\r\n\r\n")
