"""Themes: which one was chosen is kept; one more with high contrast."""

import json
import os
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from textual.theme import Theme

DEFAULT = "textual-dark"
HIGH_CONTRAST = Theme(
    name="high-contrast",
    primary="#ffff00",
    secondary="#00ffff",
    accent="#ffff00",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#202020",
    boost="#303030",
    warning="#ffaf00",
    error="#ff8080",
    success="#80ff80",
    dark=True,
)


class Themes:
    """The name of the chosen theme in a file; $TEXTUAL_THEME goes before it."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def chosen(self, known: Container[str]) -> str:
        """The theme to begin with; what is not known (any more) is passed over."""
        names = [os.environ.get("TEXTUAL_THEME")]
        if self._path:
            with suppress(OSError, ValueError, AttributeError):
                names.append(json.loads(self._path.read_bytes()).get("theme"))
        return next((n for n in names if isinstance(n, str) and n in known), DEFAULT)

    def keep(self, name: str) -> None:
        """Remember the choice; a disk that refuses is no obstacle."""
        if self._path:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                self._path.write_text(json.dumps({"theme": name}) + "\n")
