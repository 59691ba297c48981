"""Markdown that grows: whatever the pieces and the width, the screen ends up the same."""

import asyncio
import io
import os
import re
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvrun.chat import markdown
from kvrun.chat.markdown import MarkdownScreen, split

SAMPLE = """\
# Tides

The *moon* pulls:
roses are red
<think>violets</think> are [bold]blue[/bold] List<int>

1. one

2. two

   nested, and a line that is long enough to be wrapped on a narrow screen

```python
def f(x):

    return "not # a heading"
```

| a | b |
|---|---|
| 1 | 2 |

See [text](http://example.com/x). 雪 🎉
- a
  - b
"""


class Terminal(io.StringIO):
    """As much of a terminal as the screen uses: rows, a cursor, wrapping, erasing below."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.rows: list[str] = [""]
        self.at = 0

    def write(self, text: str) -> int:
        for token in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[\d;]*m|[^\x1b]", text):
            if token == "\n":
                self.at += 1
                self.rows += [""] * (self.at + 1 - len(self.rows))
            elif token.endswith("A") and token.startswith("\x1b"):
                climb = int(token[2:-1])
                # What has scrolled out of sight cannot be reached.
                assert self.at - climb >= len(self.rows) - self.height
                self.at -= climb
            elif token == "\x1b[2K":
                self.rows[self.at] = ""
            elif token.startswith("\x1b") and not token.endswith("m"):
                raise AssertionError(f"unexpected {token!r}")
            elif token != "\r" and not token.startswith("\x1b"):
                if len(self.rows[self.at]) == self.width:
                    self.at += 1
                    self.rows += [""] * (self.at + 1 - len(self.rows))
                self.rows[self.at] += token
        return len(text)

    def lines(self) -> list[str]:
        return [row.rstrip() for row in self.rows]


@pytest.fixture(autouse=True)
def terminal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(markdown, "_size", lambda out: os.terminal_size((out.width, out.height)))


async def show(pieces: list[str], width: int = 40, height: int = 12) -> list[str]:
    """The screen after an answer in pieces, redrawn after each of them."""
    terminal = Terminal(width, height)
    screen = MarkdownScreen(terminal)
    for piece in pieces:
        screen.write(piece)
        screen._draw()
    screen.end()
    return terminal.lines()


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces = []
    for size in sizes:
        pieces.append(text[:size])
        text = text[size:]
    return [*pieces, text]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.sampled_from([20, 33, 80]))
@example([1] * len(SAMPLE), 40)
def test_the_screen_does_not_depend_on_the_pieces(sizes: list[int], width: int) -> None:
    pieces = asyncio.run(show(cut(SAMPLE, sizes), width))
    whole = asyncio.run(show([SAMPLE], width))
    assert pieces == whole


async def test_what_is_shown() -> None:
    lines = await show([SAMPLE], width=60, height=50)
    text = "\n".join(lines)
    assert "<think>violets</think> are [bold]blue[/bold] List<int>" in text
    assert "roses are red\n" in text  # a line break stays one
    assert "text (http://example.com/x)" in text
    assert " 2 two\n   nested" in text
    assert "*" not in text
    assert "```" not in text
    assert not any(a == b == "" for a, b in pairwise(lines[:-1])), lines


async def test_a_block_longer_than_the_screen_is_printed_once() -> None:
    rows = "".join(f"- item {i}\n" for i in range(50))
    lines = await show(cut(rows, [7] * 80), height=10)
    assert [line.strip() for line in lines if line] == [f"• item {i}" for i in range(50)]


async def test_a_narrower_terminal_leaves_no_rests() -> None:
    terminal = Terminal(60, 40)
    screen = MarkdownScreen(terminal)
    words = "word " * 30
    screen.write(words)
    screen._draw()
    narrow = Terminal(25, 40)
    for row in terminal.lines():  # as a terminal that wraps its lines anew
        narrow.write(row + "\n")
    narrow.at -= 1
    narrow.rows.pop()
    screen._out = narrow
    screen.write("end")
    screen.end()
    assert " ".join(" ".join(narrow.lines()).split()) == words + "end"


async def test_untrusted_text_cannot_steer_the_terminal() -> None:
    terminal = Terminal(60, 20)
    screen = MarkdownScreen(terminal)
    for piece in ("a\x1b[2J\x1b]0;owned\x07b ", "[x](http://e\x1b]8;;) \x9b31m", "`\x1b[H`\n"):
        screen.write(piece)
    screen.end()
    screen.note("note \x1b[5m [red]x[/red]")
    written = terminal.getvalue() + "".join(terminal.rows)
    assert "\x1b]" not in written
    assert "\x07" not in written
    assert "[red]x[/red]" in "\n".join(terminal.rows)


async def test_without_colour_nothing_is_coloured() -> None:
    colours = []
    for color in (True, False):
        out = io.StringIO()
        out.width, out.height = 60, 20  # type: ignore[attr-defined]
        screen = MarkdownScreen(out, color=color)
        screen.write("# title\n\n`code` and [text](http://x)\n\n```python\nimport x\n```\n")
        screen.end()
        codes = re.findall(r"\x1b\[([\d;]*)m", out.getvalue())
        colours.append([c for code in codes for c in code.split(";") if 30 <= int(c or 0) <= 107])
    assert colours[0]
    assert not colours[1]


@pytest.mark.parametrize(
    ("text", "done"),
    [
        ("one\n\ntwo", ["one\n\n"]),
        ("one\n\ntwo\n\nthree", ["one\n\n", "two\n\n"]),
        ("one\n\n", []),  # an indented line may still follow
        ("one\n\n  two", []),
        ("- a\n\n  b\n\nc\n", ["- a\n\n  b\n\n"]),
        ("```\na\n\nb", []),
        ("```\na\n\nb\n```\n\nc", ["```\na\n\nb\n```\n\n"]),
        ("~~~\n```\n\nx\n", []),
        ("one\ntwo", []),
    ],
)
def test_split(text: str, done: list[str]) -> None:
    assert split(text) == (done, text[len("".join(done)) :])
