"""The keyboard while an answer streams: the first Ctrl+C stops it, the second leaves."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine, Iterator
from types import FrameType, TracebackType
from typing import Any, Self

if sys.platform != "win32":
    import termios


class Interrupts:
    """`with Interrupts() as it: await it.run(answer)`; `it.count` says how often Ctrl+C came."""

    def __init__(self) -> None:
        self.count = 0
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._before = signal.getsignal(signal.SIGINT)
        try:
            # The loop's own: one of Python's is not run once the loop has decided to wait.
            self._loop.add_signal_handler(signal.SIGINT, self._stop)
        except NotImplementedError:  # on Windows
            signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(NotImplementedError):
            self._loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, self._before)

    async def run(self, work: Coroutine[Any, Any, None]) -> bool:
        """Await `work`; False when Ctrl+C ended it. Raises KeyboardInterrupt for a second one."""
        self._task = asyncio.create_task(work)
        try:
            await self._task
        except asyncio.CancelledError:
            if not self.count:
                raise
        if self.count > 1:
            raise KeyboardInterrupt
        return not self.count

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A signal handler may run between any two bytecodes; the loop does the rest.
        self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        self.count += 1
        if self._task:
            self._task.cancel()


@contextlib.contextmanager
def keys_kept() -> Iterator[None]:
    """What is typed while an answer comes does not land in its middle; it waits, key by key.

    Ctrl+C stays a signal. For a reader that reads keys: one that reads lines would miss Enter.
    """
    before = None
    if sys.platform != "win32":
        with contextlib.suppress(termios.error, OSError, ValueError):
            before = termios.tcgetattr(sys.stdin.fileno())
            quiet = termios.tcgetattr(sys.stdin.fileno())
            quiet[0] &= ~termios.ICRNL
            quiet[3] &= ~(termios.ECHO | termios.ICANON)
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        if before is not None and sys.platform != "win32":
            with contextlib.suppress(termios.error, OSError, ValueError):
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
