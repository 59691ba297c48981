"""Nothing that a terminal obeys gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrun.chat.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text\n\twith tabs", "plain text\n\twith tabs"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x1b]0;title\x07", "]0;title"),
        ("\x1b]8;;http://evil\x1b\\click\x1b]8;;\x1b\\", "]8;;http://evil\\click]8;;\\"),
        ("8-bit \x9b31m and \x9dosc\x9c", "8-bit 31m and osc"),
        ("over\rwritten\b\b", "overwritten"),
        ("\u202egnp.exe\u202c \u2066x\u2069", "gnp.exe x"),
        ("שלום 雪 🎉 é", "שלום 雪 🎉 é"),
        ("[bold]markup[/bold]", "[bold]markup[/bold]"),
        ("half \ud83d", "half \ufffd"),
    ],
)
def test_examples(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text(alphabet=st.characters(codec=None), max_size=40), st.integers(0, 40))
def test_pieces_of_a_stream_are_as_safe_as_the_whole(text: str, cut: int) -> None:
    whole = printable(text)
    assert printable(text[:cut]) + printable(text[cut:]) == whole
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) <= 0x9F for c in whole)
    whole.encode()
