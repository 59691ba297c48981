"""Code blocks of an answer."""

from kvrun.chat.blocks import code_blocks


def test_code_blocks_in_their_order() -> None:
    text = "a\n```py\nx = 1\n\ny\n```\nb\n~~~\n```\n~~~\n```\nopen"
    assert code_blocks(text) == ["x = 1\n\ny", "```", "open"]
    assert code_blocks("none") == []
