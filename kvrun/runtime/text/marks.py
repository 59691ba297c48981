"""Marks: strings that pass through a chat template and that nobody outside can have written."""

import os

OPEN, CLOSE = "\ue000", "\ue001"
# Private-use characters only, so that no normalizer changes them and no ordinary token is in them.
SECRET = "".join(chr(0xE100 + byte) for byte in os.urandom(12))


def mark(name: str | int) -> str:
    """The mark called `name`, the same during one run of the program."""
    return OPEN + SECRET + "".join(chr(0xE200 + byte) for byte in str(name).encode()) + CLOSE
