"""An answer as Markdown that grows: finished blocks are printed once, the last one is redrawn."""

import asyncio
import os
from io import StringIO
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.segment import SegmentLines

from kvrun.chat.blocks import split
from kvrun.chat.printable import printable
from kvrun.chat.rendered import rendered

FRAME_SECONDS = 0.04


class MarkdownScreen:
    """Writes to a terminal of any width, which may change while an answer comes.

    Only the block that is still growing is ever redrawn, and never more of it than the screen
    shows, so the scrollback holds every line once.
    """

    def __init__(self, out: TextIO, *, color: bool = True) -> None:
        self._out = out
        self._color = color
        self._tail = ""  # the block that still grows
        self._drawn: list[str] = []  # its lines on the screen, without colours
        self._between = False  # whether an empty line parts the next block from the last
        self._due: asyncio.TimerHandle | None = None

    def write(self, piece: str) -> None:
        """A piece of an answer. Needs a running event loop, which draws at most 25 frames/s."""
        self._tail += printable(piece)
        done, self._tail = split(self._tail)
        for block in done:
            self._print(block)
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(FRAME_SECONDS, self._draw)

    def end(self) -> None:
        """The answer is complete: print what is left of it."""
        if self._due:
            self._due.cancel()
            self._due = None
        last, self._tail = self._tail, ""
        if last.strip():
            self._print(last)
        else:
            self._put(self._erased())
        if self._between:
            self._put("\n")
        self._between = False

    def question(self, text: str) -> None:
        """A question of a conversation that is shown again."""
        self.note("".join(f"> {line}\n" for line in printable(text).splitlines()))

    def note(self, text: str) -> None:
        """Something kvrun says itself, below whatever stands there."""
        self.end()
        console = self._console()
        with console.capture() as capture:
            console.print(printable(text).rstrip("\n"), style="dim", markup=False, highlight=False)
        self._put(capture.get())

    def wipe(self) -> None:
        """Begin with an empty screen."""
        self._put("\x1b[2J\x1b[H")

    def _draw(self) -> None:
        """Redraw the growing block, as much of it as fits on the screen."""
        self._due = None
        console = self._console()
        lines = _lines(console, self._tail)[-max(1, console.height - 2) :]
        gap = "\n" if self._between and lines else ""
        self._put(self._erased() + gap + "\n".join(styled for styled, _ in lines))
        self._drawn = ([""] if gap else []) + [plain for _, plain in lines]

    def _print(self, block: str) -> None:
        lines = _lines(self._console(), block)
        gap = "\n" if self._between and lines else ""
        self._put(self._erased() + gap + "".join(styled + "\n" for styled, _ in lines))
        self._between = self._between or bool(lines)

    def _erased(self) -> str:
        """The codes that take the drawn lines back, wrapped as the width now has them."""
        if not self._drawn:
            return ""
        width = self._console().width
        rows = sum(max(1, -(-cell_len(line) // width)) for line in self._drawn)
        self._drawn = []
        # Row by row: erasing all below, from the first row of the screen, is a clearing that some
        # terminals keep a copy of in their scrollback.
        return "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (rows - 1)

    def _console(self) -> Console:
        size = _size(self._out)
        return Console(
            file=StringIO(),
            force_terminal=True,
            legacy_windows=False,
            no_color=not self._color,
            width=size.columns,
            height=size.lines,
        )

    def _put(self, text: str) -> None:
        if text:
            self._out.write(text)
            self._out.flush()


def _lines(console: Console, text: str) -> list[tuple[str, str]]:
    """Markdown as lines, each with its colours and without."""
    kept = rendered(console, text)
    if not kept:
        return []
    with console.capture() as capture:
        console.print(SegmentLines(kept, new_lines=True), end="")
    plain = ("".join(segment.text for segment in segments) for segments in kept)
    return list(zip(capture.get().split("\n"), plain, strict=False))


def _size(out: TextIO) -> os.terminal_size:
    try:
        size = os.get_terminal_size(out.fileno())
    except (OSError, ValueError):
        size = os.terminal_size((80, 24))
    # Of a terminal that says nothing of its size, zeros come.
    return os.terminal_size((max(20, size.columns or 80), size.lines or 24))
