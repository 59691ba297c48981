"""Text of a model or a file, made safe to print: what a terminal would obey is taken out."""

import re

# C0 but for tab and newline, DEL, C1 (8-bit CSI and OSC among them), and the characters that
# reorder a line so that it reads as something it is not.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without characters that a terminal obeys; stateless, so pieces of a stream may pass.

    Of an escape sequence the ESC goes and the rest is shown literally.
    """
    return _LONE_SURROGATE.sub("\ufffd", _OBEYED.sub("", text))
