"""Progress of long work: one line on stderr, when a person is looking at it."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Work:
    """A line with what is being done; each `say` is one more of `total` (None: not known).

    Where nobody looks, `lines` asks for a line each, with the seconds since the start.
    """

    def __init__(
        self, *, total: int | None = None, shown: bool = True, lines: bool = False
    ) -> None:
        looked_at = shown and sys.stderr is not None and sys.stderr.isatty()
        self._lines, self._begun = lines and shown and not looked_at, time.monotonic()
        # Drawn twice a second: whatever is drawn takes time from what is measured.
        self._progress = Progress(
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            disable=not looked_at,
            transient=True,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("", total=total)

    def say(self, text: str) -> None:
        """What is done now."""
        if self._lines:
            note(f"{time.monotonic() - self._begun:6.1f} s  {text}")
        self._progress.update(self._task, description=text, advance=1)

    def stop(self) -> None:
        """Take the line away, so that results can be printed."""
        self._progress.stop()

    def __enter__(self) -> "Work":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def note(text: str) -> None:
    """A line on stderr."""
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)
