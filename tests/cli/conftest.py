"""`kvrun` in this process, and in a terminal of its own, both on the scripted engine."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import kvrun.runtime.engine.client
from kvrun.cli import main

ROOT = Path(__file__).parents[2]
SCRIPTED = ROOT / "tests" / "chat" / "scripted.py"
PATIENCE = 30.0  # seconds until a test gives up, not a time that anything should take


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of the user's own settings, history or models takes part."""
    for name in [name for name in os.environ if name.startswith(("KVRUN_", "HF_", "XDG_"))]:
        monkeypatch.delenv(name)
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TERM", "xterm-256color")
    return tmp_path


@pytest.fixture
def kvrun_command(
    scripted: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Run `kvrun WORDS` with `stdin`; the code and what was printed."""
    monkeypatch.setattr(kvrun.runtime.engine.client, "EngineClient", scripted.ScriptedEngine)

    def run(*words: str, stdin: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        before = signal.getsignal(signal.SIGTERM)
        try:
            with pytest.raises(SystemExit) as end:
                main(list(words))
        finally:
            signal.signal(signal.SIGTERM, before)
        captured = capsys.readouterr()
        return Result(int(end.value.code or 0), captured.out, captured.err)

    return run


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, words: list[str], size: tuple[int, int] = (24, 80)) -> None:
        self.seen = ""  # everything, escape codes too
        self._at = 0  # what of it, without them, has been expected
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(self._fd, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        # No `pty.fork`: until the child is another program, it would run Python in a copy of a
        # process whose other threads are gone, with whatever they held. The shell leads a session
        # without a terminal, so that the one it opens becomes its own, Ctrl-C included.
        self._process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', os.ttyname(theirs), sys.executable, *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self.modes = termios.tcgetattr(self._fd)
        self.code: int | None = None

    def expect(self, text: str) -> str:
        """Read on until `text` shows up, escape codes left out; all since the last call."""
        end = time.monotonic() + PATIENCE
        while (found := (plain := strip(self.seen)).find(text, self._at)) < 0:
            assert time.monotonic() < end, f"no {text!r} in {plain[self._at :]!r}"
            assert self._read(), f"ended without {text!r}: {plain[self._at :]!r}"
        since = plain[self._at : found + len(text)]
        self._at = found + len(text)
        return since

    def until(self, event: threading.Event) -> None:
        """Read on until something outside the program has happened."""
        end = time.monotonic() + PATIENCE
        while not event.wait(0.01):
            assert time.monotonic() < end, f"it never came: {strip(self.seen)[self._at :]!r}"
            if select.select([self._fd], [], [], 0)[0]:
                assert self._read(), f"ended before: {strip(self.seen)[self._at :]!r}"

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code, once everything has been read; a signal as its negative."""
        while self._read():
            pass
        self.code = self._process.wait()
        return self.code

    def restored(self) -> bool:
        """Whether echo, line mode and all others are as they were before."""
        return termios.tcgetattr(self._fd) == self.modes

    def close(self) -> None:
        if self.code is None:
            self._process.kill()
            self._process.wait()
        os.close(self._fd)

    def _read(self) -> bool:
        """Take in what comes next; False at the end of the program's output."""
        ready, _, _ = select.select([self._fd], [], [], PATIENCE)
        assert ready, f"nothing comes after {strip(self.seen)[self._at :]!r}"
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux's way to say that the other side has gone
            data = b""
        self.seen += data.decode(errors="replace")
        # prompt_toolkit asks where the cursor is, and a real terminal would answer.
        if b"\x1b[6n" in data:
            self.type("\x1b[1;1R")
        return bool(data)


def strip(text: str) -> str:
    """Text without escape codes, as a person sees it."""
    return re.sub(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[@-Z\\-_=>])", "", text).replace(
        "\r", ""
    )


@pytest.fixture
def terminal(model: Path) -> Iterator[Callable[..., Terminal]]:
    """Start `kvrun chat WORDS` on the scripted engine in a terminal."""
    opened = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal([str(SCRIPTED), "chat", "-m", str(model), *words]))
        return opened[-1]

    yield start
    for one in opened:
        one.close()
