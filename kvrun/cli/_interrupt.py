"""Ctrl+C while torch is imported, which catches a KeyboardInterrupt here and there and goes on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from kvrun.cli._guard import INTERRUPTED


def import_torch() -> None:
    """Import torch; Ctrl+C ends the process. For commands that compute in this process and have
    begun nothing yet."""
    with at_once():
        import torch  # noqa: F401


@contextmanager
def at_once() -> Iterator[None]:
    """Let Ctrl+C end the process without an exception, which whatever runs could catch.

    A handler that somebody else has set, or that ignores it, stays.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
