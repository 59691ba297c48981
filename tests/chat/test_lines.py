"""What counts as a command, as a block, as text."""

import pytest

from kvrun.chat.lines import is_command, unfinished, unquoted


@pytest.mark.parametrize(
    ("typed", "command", "text"),
    [
        ("hello", False, "hello"),
        ("/help", True, None),
        ("//etc/hosts is what?", False, "/etc/hosts is what?"),
        ("a / b", False, "a / b"),
        ('"""one\ntwo"""', False, "one\ntwo"),
        ('"""\none\n  two\n"""', False, "one\n  two"),
        ('""" in one line """', False, "in one line"),
        ('he said """x"""', False, 'he said """x"""'),
    ],
)
def test_what_was_typed(typed: str, command: bool, text: str | None) -> None:
    assert is_command(typed) is command
    if text is not None:
        assert unquoted(typed) == text


@pytest.mark.parametrize(
    ("typed", "open_"),
    [('"""', True), ('"""a\nb', True), ('"""a"""', False), ('  """a', True), ('a """b', False)],
)
def test_a_block_is_open_until_its_end(typed: str, open_: bool) -> None:
    assert unfinished(typed) is open_
