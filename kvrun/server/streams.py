"""Streams: the event streams that are open now, so that silent ones can be kept alive."""

from typing import Protocol


class Stream(Protocol):
    """An open event stream; `last` is when it was last written to (monotonic seconds)."""

    last: float

    def comment(self) -> None: ...


class Streams:
    """The event streams that are open now."""

    def __init__(self) -> None:
        self._open: set[Stream] = set()

    def add(self, stream: Stream) -> None:
        self._open.add(stream)

    def discard(self, stream: Stream) -> None:
        self._open.discard(stream)

    def __contains__(self, stream: object) -> bool:
        return stream in self._open

    def sweep(self, now: float, after: float) -> None:
        """Send a comment into every stream that has been silent for `after` seconds."""
        for stream in self._open:
            if now - stream.last > after:
                stream.comment()
