"""Entries of a column as lines: a question, an answer, an answer that grows, a note."""

from dataclasses import dataclass
from functools import cached_property
from io import StringIO

from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.strip import Strip

from kvrun.chat.blocks import split
from kvrun.chat.conversation import Message
from kvrun.chat.printable import printable
from kvrun.chat.rendered import rendered

CURSOR = "▌"
LIVE_BLOCK = 800  # characters of a growing block that are worth rendering ten times a second
PIECE = 600  # characters of a longer one that stay plain lines until its end is known
MOST_MARKDOWN = 32_000  # characters of a single block; a longer one stays plain
MOST_QUESTION = 2000  # characters of a question that are shown
GUTTER = 3


@dataclass(frozen=True)
class Ink:
    """How lines are made: their width, the column's own style, for a dark or a light screen."""

    width: int
    style: Style
    dark: bool = True

    @cached_property
    def console(self) -> Console:
        return Console(
            file=StringIO(), width=max(4, self.width), force_terminal=True, legacy_windows=False
        )

    def markdown(self, text: str) -> list[Strip]:
        """Markdown as lines."""
        theme = "ansi_dark" if self.dark else "ansi_light"
        return [self.strip(line) for line in rendered(self.console, text, theme)]

    def plain(self, text: str, style: Style | None = None) -> list[Strip]:
        """A text as it is, wrapped at words."""
        made = Text(text, style=style or Style(), tab_size=4)
        made.expand_tabs()
        lines = made.wrap(self.console, max(4, self.width), overflow="fold")
        return [self.strip(list(line.render(self.console, end=""))) for line in lines]

    def strip(self, segments: list[Segment]) -> Strip:
        return Strip(segments).apply_style(self.style).extend_cell_length(0)


class Entry:
    """Something that stands in a column; its lines are made once for each Ink."""

    def __init__(self, text: str, message: Message | None = None) -> None:
        self.text = printable(text)
        self.message = message
        self._ink: Ink | None = None
        self._lines: list[Strip] = []

    def lines(self, ink: Ink) -> list[Strip]:
        """Its lines without the gutter."""
        if ink != self._ink:
            self._ink = ink
            self._lines = self._made(ink)
        return self._lines

    def mark(self, line: int) -> str:
        """What stands in the gutter before a line; at most GUTTER cells."""
        return ""

    def _made(self, ink: Ink) -> list[Strip]:
        return ink.plain(self.text)


class Question(Entry):
    """What was asked; `versions` is like "2/3" when there are others."""

    def __init__(self, message: Message, versions: str = "") -> None:
        super().__init__(message.content, message)
        self._versions = versions

    def mark(self, line: int) -> str:
        return " ›" if line == 0 else ""

    def _made(self, ink: Ink) -> list[Strip]:
        text, more = self.text[:MOST_QUESTION], len(self.text) - MOST_QUESTION
        if more > 0:
            text += f" … ({more:,} characters more)"
        version = f"‹{self._versions}› " if self._versions else ""
        return ink.plain(version + text, Style(bold=True))


class Note(Entry):
    """Something kvrun says itself."""

    def __init__(self, text: str, *, error: bool = False) -> None:
        super().__init__(text)
        self._error = error

    def mark(self, line: int) -> str:
        return " !" if self._error and line == 0 else " │"

    def _made(self, ink: Ink) -> list[Strip]:
        return ink.plain(self.text, Style(bold=True) if self._error else Style(dim=True))


class Answer(Entry):
    """An answer that is complete, as Markdown."""

    def __init__(self, message: Message, versions: str = "") -> None:
        super().__init__(message.content, message)
        self._versions = versions

    def _made(self, ink: Ink) -> list[Strip]:
        done, rest = split(self.text)
        return _version(ink, self._versions) + _joined(
            [_block(ink, block) for block in [*done, rest]]
        )


class Growing(Entry):
    """An answer that comes: blocks that are complete are rendered once, the last one each time.
    `finish` makes it an answer like the others.

    A last block that grows long is shown plain, piece by piece, so that a frame costs the same
    however long the answer is; it becomes Markdown when its end is known.
    """

    def __init__(self) -> None:
        super().__init__("")
        self._blocks: list[list[Strip]] = []
        self._tail = ""  # the block that has no end yet
        self._cut = 0  # characters of it that are plain lines already
        self._plain: list[Strip] = []
        self._stale = True
        self._versions = ""
        self._cursor = CURSOR

    def finish(self, message: Message, versions: str = "") -> None:
        """It is complete, and has become a message; what was rendered of it is kept."""
        self.message, self._versions = message, versions
        self._cursor, self._stale = "", True

    def grow(self, text: str) -> None:
        """Take in what has come."""
        self.text += text
        self._tail += text
        self._stale = True

    def lines(self, ink: Ink) -> list[Strip]:
        if ink != self._ink:
            self._ink, self._tail, self._stale = ink, self.text, True
            self._blocks, self._plain, self._cut = [], [], 0
        if self._stale:
            self._stale = False
            # Lines that came out the same keep their identity, so that nobody draws them again.
            old, self._lines = self._lines, self._grown(ink)
            for at, (before, now) in enumerate(zip(old, self._lines, strict=False)):
                if before is not now and before == now:
                    self._lines[at] = before
        return self._lines

    def _grown(self, ink: Ink) -> list[Strip]:
        first = _version(ink, self._versions)
        if not self._cut or "\n\n" in self._tail:
            done, rest = split(self._tail)
            if done:
                self._blocks += [_block(ink, block) for block in done]
                self._tail, self._cut, self._plain = rest, 0, []
        if not self._cursor:
            return first + _joined([*self._blocks, _block(ink, self._tail)])
        if len(self._tail) <= LIVE_BLOCK and self._tail.strip():
            return _joined([*self._blocks, ink.markdown(self._tail + CURSOR)])
        while len(self._tail) - self._cut > PIECE:
            at = self._tail.rfind("\n", self._cut, self._cut + PIECE) + 1
            at = at or self._tail.rfind(" ", self._cut, self._cut + PIECE) + 1 or self._cut + PIECE
            self._plain += ink.plain(self._tail[self._cut : at].removesuffix("\n"))
            self._cut = at
        last = ink.plain(self._tail[self._cut :] + CURSOR)
        return _joined([*self._blocks, self._plain + last])


def _version(ink: Ink, versions: str) -> list[Strip]:
    return ink.plain(f"‹{versions}›", Style(dim=True)) if versions else []


def _block(ink: Ink, text: str) -> list[Strip]:
    return ink.plain(text.strip("\n")) if len(text) > MOST_MARKDOWN else ink.markdown(text)


def _joined(blocks: list[list[Strip]]) -> list[Strip]:
    """The lines of blocks, with an empty one between them."""
    lines: list[Strip] = []
    for block in blocks:
        if lines and block:
            lines.append(Strip([]))
        lines += block
    return lines
