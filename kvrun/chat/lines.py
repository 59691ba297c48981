"""What was typed: a command, a block of several lines, or plain text."""

QUOTES = '"""'


def is_command(text: str) -> bool:
    """Whether what was typed is a command; "//" at the start sends text with one slash."""
    return text.startswith("/") and not text.startswith("//")


def unfinished(text: str) -> bool:
    '''Whether a block of text opened with """ waits for its end.'''
    start = text.lstrip()
    return start.startswith(QUOTES) and QUOTES not in start[len(QUOTES) :]


def unquoted(text: str) -> str:
    '''What was typed, without the """ around a block or the slash that hides a slash.'''
    stripped = text.strip()
    if stripped.startswith(QUOTES):
        body, _, rest = stripped[len(QUOTES) :].partition(QUOTES)
        return (body.strip("\n") + rest).strip()
    return stripped.removeprefix("/") if stripped.startswith("//") else stripped
