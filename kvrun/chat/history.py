"""What was asked before, in the file that the line editor keeps too."""

import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

MOST = 1000  # questions that are read; the file itself keeps all


class History:
    """Questions, the newest last. What cannot be read or written is no obstacle."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: list[str] | None = None

    @property
    def entries(self) -> list[str]:
        if self._entries is None:
            self._entries = _read(self._path)
        return self._entries

    def add(self, text: str) -> None:
        """Remember a question; the same one twice in a row counts once."""
        if self.entries[-1:] == [text]:
            return
        self.entries.append(text)
        if self._path is None:
            return
        with suppress(OSError, UnicodeError):
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            handle = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(f"\n# {datetime.now()}\n")
                file.writelines(f"+{line}\n" for line in text.split("\n"))


def _read(path: Path | None) -> list[str]:
    entries: list[list[str]] = []
    ended = True
    with suppress(OSError):
        for line in path.read_text("utf-8", "replace").splitlines() if path else ():
            if not line.startswith("+"):
                ended = True
            elif ended:
                entries.append([line[1:]])
                ended = False
            else:
                entries[-1].append(line[1:])
    return ["\n".join(lines) for lines in entries[-MOST:]]
