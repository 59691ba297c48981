"""A conversation as plain lines: for pipes, dumb terminals and screen readers."""

import asyncio
import contextlib
import select
import signal
import socket
import sys
from collections.abc import Iterator
from typing import TextIO

from kvrun.chat.lines import unfinished
from kvrun.chat.printable import printable

WAITING_SECONDS = 0.5


class PlainScreen:
    """Text goes out as it comes, without colour or cursor movement.

    It is made safe to print, unless `raw`: for a file or another program, that want it unchanged.
    """

    def __init__(self, out: TextIO, *, raw: bool = False) -> None:
        self._out = out
        self._raw = raw
        self._at_line_start = True

    def write(self, piece: str) -> None:
        """A piece of an answer."""
        self._put(piece if self._raw else printable(piece))

    def end(self) -> None:
        """The answer is complete."""
        if not self._at_line_start:
            self._put("\n")

    def question(self, text: str) -> None:
        """A question of a conversation that is shown again."""
        self._put("".join(f"> {line}\n" for line in printable(text).splitlines()))

    def note(self, text: str) -> None:
        """Something kvrun says itself."""
        self.end()
        self._put(f"{printable(text)}\n")

    def wipe(self) -> None:
        """There is nothing to wipe: what was printed stays."""

    def _put(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()
            self._at_line_start = text.endswith("\n")


class PlainReader:
    """Reads what is typed with nothing but the terminal's own line editing."""

    async def read(self) -> str:
        """One input, a block of lines counting as one. Raises EOFError, KeyboardInterrupt.

        It blocks the loop: nothing else goes on between two answers.
        """
        try:
            with _signals_by_default() as woken:
                text = _line("> ", woken)
                while unfinished(text):
                    text += "\n" + _line(". ", woken)
        except (EOFError, KeyboardInterrupt):
            print()  # the prompt still stands on this line
            raise
        return text

    def quiet(self) -> contextlib.AbstractContextManager[None]:
        """The terminal stays as it is."""
        return contextlib.nullcontext()


def _line(prompt: str, woken: socket.socket) -> str:
    # Not input(): between its prompt and its read it does not notice Ctrl+C.
    print(prompt, end="", flush=True)
    # Neither does a read that is about to begin. A terminal gives a line at a time, so that none
    # waits in a buffer that select does not see.
    while sys.platform != "win32" and is_terminal(sys.stdin):
        ready, _, _ = select.select([sys.stdin, woken], [], [])
        if sys.stdin in ready:
            break
        woken.recv(64)
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.rstrip("\n")


@contextlib.contextmanager
def _signals_by_default() -> Iterator[socket.socket]:
    """Let signals interrupt a blocking read; asyncio's own handlers wait for the loop instead.

    Gives a socket that has something to read once a signal has come.
    """
    woken, waking = socket.socketpair()
    with woken, waking:
        waking.setblocking(False)
        before = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
        interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
        terminate = signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            yield woken
        finally:
            signal.signal(signal.SIGINT, interrupt)
            signal.signal(signal.SIGTERM, terminate)
            signal.set_wakeup_fd(before)


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person is at the other end."""
    with contextlib.suppress(ValueError, OSError):
        return stream is not None and stream.isatty()
    return False


def note(text: str) -> None:
    """Progress and remarks: a line on stderr."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(printable(text), file=sys.stderr, flush=True)


class Waiting:
    """A line on stderr while something takes its time; it goes away when that is done.

    Needs a running event loop. Nothing is shown for what is quick, or when nobody looks.
    """

    def __init__(self, text: str, *, shown: bool = True) -> None:
        self._text = printable(text)
        self._shown = shown and is_terminal(sys.stderr)
        self._drawn = False

    def __enter__(self) -> None:
        if self._shown:
            loop = asyncio.get_running_loop()
            self._due = loop.call_later(WAITING_SECONDS, self._draw)

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._due.cancel()
        if self._drawn:
            self._put("\r\x1b[K")

    def _draw(self) -> None:
        self._drawn = True
        self._put(self._text)

    def _put(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()
