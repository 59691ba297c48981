"""Pictures: image files that a question names, and questions as templates take them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A path that says so by its beginning and its end; spaces in it stand behind a \ or in quotes.
_PATH = re.compile(
    r"""(?<!\S)(?:(?P<quote>['"])(?P<quoted>(?:~|\.{1,2})?/[^'"\n]+?)(?P=quote)"""
    r"""|(?P<bare>(?:~|\.{1,2})?/(?:\\.|[^\s\\'"])+?))(?=[\s,;:?!]|$)""",
)
_ENDS = (".png", ".jpg", ".jpeg")


def named(words: str) -> tuple[str, list[str]]:
    """A question without the image files it names, and these; a path to no file stays text."""
    found: list[str] = []

    def take(match: re.Match[str]) -> str:
        bare = match["bare"]
        path = match["quoted"] or re.sub(r"\\(.)", r"\1", bare)
        place = Path(path).expanduser()
        if place.suffix.lower() not in _ENDS or not place.is_file():
            return match[0]
        found.append(str(place))
        return ""

    text = _PATH.sub(take, words)
    return (re.sub(r"[ \t]{2,}", " ", text).strip() if found else words), found


def content(text: str, images: Sequence[str]) -> str | list[dict[str, Any]]:
    """What a message holds: its text, or parts, images first."""
    if not images:
        return text
    parts: list[dict[str, Any]] = [{"type": "image", "image": path} for path in images]
    return [*parts, {"type": "text", "text": text}]


def text_of(content: str | list[dict[str, Any]]) -> str:
    """The text in what a message holds."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part["type"] == "text")
