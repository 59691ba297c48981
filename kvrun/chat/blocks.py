"""Blocks of Markdown: where a text that still grows can be cut."""

import re

FENCES = ("```", "~~~")


def split(text: str) -> tuple[list[str], str]:
    """The blocks of Markdown that what follows can no longer change, and the rest.

    A block ends before a line at the margin that follows an empty line outside of a code fence.
    """
    blocks, start, at, fence, empty = [], 0, 0, "", False
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        # Even of a line that is not complete the beginning tells that it is not indented.
        if empty and not fence and line[:1].strip():
            blocks.append(text[start:at])
            start = at
        if not line.endswith("\n"):
            break
        mark = line.lstrip()[:3]
        if fence:
            fence = "" if mark == fence else fence
        elif mark in FENCES:
            fence = mark
        empty = not line.strip()
        at += len(line)
    return blocks, text[start:]


def code_blocks(text: str) -> list[str]:
    """What stands between the fences of a Markdown text, in order; the last may be unclosed."""
    found: list[list[str]] = []
    fence = ""
    for line in text.splitlines():
        mark = line.lstrip()[:3]
        if fence:
            if mark == fence:
                fence = ""
            else:
                found[-1].append(line)
        elif mark in FENCES:
            fence = mark
            found.append([])
    return ["\n".join(lines) for lines in found]
