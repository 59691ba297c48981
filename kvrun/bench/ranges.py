"""Lists and ranges of whole numbers, as llama-bench writes them: 512,1024 · 1-8 · 1-64*2."""

import re
from collections.abc import Iterator

from kvrun.errors import InvalidRequest

MOST = 1000  # values; more is a slip of the finger
HINT = "write 512,1024 or FIRST-LAST, with +STEP or *FACTOR behind: 1-8, 0-64+16, 1-64*2"
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?", re.ASCII)


def parse(flag: str, text: str, *, least: int = 0) -> list[int]:
    """The values `text` lists, in its order, each once.

    Raises InvalidRequest, naming `flag`, for what is no list and for values below `least`.
    """
    values: dict[int, None] = {}
    for part in text.split(","):
        for value in _part(flag, part.strip()):
            if value < least:
                raise InvalidRequest(f"{flag} is '{text}': {value} is below {least}.", hint=HINT)
            values[value] = None
            if len(values) > MOST:
                raise InvalidRequest(f"{flag} '{text}' lists more than {MOST} values.", hint=HINT)
    return list(values)


def _part(flag: str, part: str) -> Iterator[int]:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise InvalidRequest(f"{flag}: '{part}' is neither a number nor a range.", hint=HINT)
    first = int(match[1])
    last = int(match[2] or match[1])
    change = int(match[4] or 1)
    multiply = match[3] == "*"
    if last < first:
        raise InvalidRequest(f"{flag}: '{part}' runs backwards.", hint=f"{last}-{first}")
    if (multiply and (change < 2 or first == 0)) or change < 1:
        raise InvalidRequest(f"{flag}: '{part}' never arrives at {last}.", hint=HINT)
    while first <= last:
        yield first
        first = first * change if multiply else first + change
