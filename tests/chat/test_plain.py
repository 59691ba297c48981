"""Plain lines: what goes to a pipe unchanged, and to a screen made safe."""

import io

import pytest

from kvrun.chat.plain import PlainReader, PlainScreen, is_terminal


def test_a_screen_is_safe_and_ends_the_line() -> None:
    out = io.StringIO()
    screen = PlainScreen(out)
    screen.write("a\x1b[31mb")
    screen.end()
    screen.end()
    screen.note("note\x07")
    screen.question("q\nr")
    assert out.getvalue() == "a[31mb\nnote\n> q\n> r\n"


def test_a_pipe_gets_the_text_as_it_is() -> None:
    out = io.StringIO()
    screen = PlainScreen(out, raw=True)
    screen.write("a\x1b[31mb\n")
    screen.end()
    assert out.getvalue() == "a\x1b[31mb\n"


async def test_a_block_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('"""one\ntwo"""\nthree\n'))
    reader = PlainReader()
    assert await reader.read() == '"""one\ntwo"""'
    assert await reader.read() == "three"
    with pytest.raises(EOFError):
        await reader.read()


def test_a_closed_stream_is_no_terminal() -> None:
    stream = io.StringIO()
    stream.close()
    assert not is_terminal(stream)
    assert not is_terminal(None)
