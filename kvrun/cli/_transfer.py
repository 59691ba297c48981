"""What a pull shows while it runs: bars in a terminal, lines elsewhere; all of it on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from kvrun.chat.plain import is_terminal, note
from kvrun.folder import load, names
from kvrun.runtime.plan import architecture, size

if TYPE_CHECKING:
    from pathlib import Path

    from kvrun.hub.remote import Offer
    from kvrun.hub.transfer import File, Watch

LINE_SECONDS = 30.0  # between two lines about a file that takes long
NAME_WIDTH = 36


class Lines:
    """A line for every file that is complete, and one now and then while nothing is."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._sizes: dict[str, int] = {}
        self._here = 0
        self._fetched = 0

    def begin(self, files: "list[File]") -> None:
        """Start the clock."""
        self._sizes = {file.name: file.size for file in files}
        self._begun = self._last = time.monotonic()

    def add(self, name: str, count: int) -> None:
        """Count, and say how far it is when that was long ago."""
        with self._lock:
            self._here += count
            self._fetched += count
            now = time.monotonic()
            if now - self._last < LINE_SECONDS:
                return
            self._last = now
            rate = max(self._fetched, 1) / (now - self._begun)
            total = sum(self._sizes.values())
            left = _clock((total - self._here) / rate)
            text = f"{size(self._here)} of {size(total)}, {size(int(rate))}/s, {left} left"
        note(text)

    def have(self, name: str, count: int) -> None:
        """Count what takes no time."""
        with self._lock:
            self._here += count

    def end(self, name: str) -> None:
        """Say it."""
        note(f"{name}  {size(self._sizes[name])}")

    def say(self, text: str) -> None:
        """Say it."""
        note(text)


class Bars:
    """One bar for each file that is under way, and one for everything: rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
            refresh_per_second=5,
        )
        self._lock = Lock()
        self._sizes: dict[str, int] = {}
        self._tasks: dict[str, Any] = {}
        self._all: Any = None

    def begin(self, files: "list[File]") -> None:
        """Show the bar for everything."""
        self._sizes = {file.name: file.size for file in files}
        self._all = self._progress.add_task("all files", total=sum(self._sizes.values()))
        self._progress.start()

    def add(self, name: str, count: int) -> None:
        """Move two bars."""
        self._progress.advance(self._task(name), count)
        self._progress.advance(self._all, count)

    def have(self, name: str, count: int) -> None:
        """Move two bars without a gain in speed."""
        with self._lock:
            for task in (self._all, self._task(name, locked=True)):
                done = next(t.completed for t in self._progress.tasks if t.id == task)
                self._progress.reset(task, completed=int(done) + count)

    def end(self, name: str) -> None:
        """Take the bar away, leave a line."""
        with self._lock:
            if name in self._tasks:
                self._progress.remove_task(self._tasks.pop(name))
        self.say(f"{name}  {size(self._sizes[name])}")

    def say(self, text: str) -> None:
        """A line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        """Take the bars away."""
        self._progress.stop()

    def _task(self, name: str, *, locked: bool = False) -> Any:
        if not locked:
            with self._lock:
                return self._task(name, locked=True)
        if name not in self._tasks:
            short = name if len(name) <= NAME_WIDTH else "…" + name[1 - NAME_WIDTH :]
            self._tasks[name] = self._progress.add_task(short, total=self._sizes[name])
        return self._tasks[name]


@contextmanager
def watching(*, quiet: bool = False, plain: bool = False) -> "Iterator[Watch]":
    """Who shows a pull: bars where a person looks, unless `plain`; nobody when `quiet`."""
    if quiet:
        yield load("kvrun.hub", "remote").Nobody()
        return
    if plain or not is_terminal(sys.stderr):
        yield Lines()
        return
    bars = Bars()
    try:
        yield bars
    finally:
        bars.stop()


def pull(name: str, offer: "Offer", *, quiet: bool = False, plain: bool = False) -> "Path":
    """Fetch what a repository offers, and say what came of it. Raises what hub.remote raises."""
    begun = time.monotonic()
    count = len(offer.missing)
    if count and not quiet:
        _warn(load("kvrun.hub", "remote").config(offer))
    if not quiet and count:
        already = f", {size(offer.here)} of it here" if offer.here else ""
        files = "1 file" if count == 1 else f"{count} files"
        note(f"pulling {name}: {files}, {size(offer.to_fetch + offer.here)}{already}")
    try:
        with watching(quiet=quiet, plain=plain) as watch:
            folder: Path = load("kvrun.hub", "remote").pull(offer, watch)
    except KeyboardInterrupt:
        if not quiet:
            note(f"stopped; kvrun pull {name} goes on from here")
        raise
    if not quiet and count:
        seconds = max(time.monotonic() - begun, 1e-3)
        fetched = offer.to_fetch
        rate = f", {size(int(fetched / seconds))}/s" if fetched else ""
        note(f"{name} is complete: {size(fetched)} in {_clock(seconds)}{rate}")
    elif not quiet:
        note(f"{name} is complete and up to date")
    return folder


def _warn(config: dict[str, Any]) -> None:
    """Say before a long transfer when kvrun could not run what comes."""
    kind, stored = architecture(config), config.get("quantization_config")
    known = names("kvrun.runtime.models")
    if kind and kind not in known and load("kvrun.runtime.fallback", "load").refusal(config):
        note(f"note: kvrun does not know the architecture '{kind[:40]}'")
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if method is not None and str(method).replace("-", "_") not in names("kvrun.runtime.quant"):
        note(f"note: kvrun does not read weights stored as '{str(method)[:40]}'")


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
