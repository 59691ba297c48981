"""Ctrl+C while an answer streams."""

import asyncio
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from kvrun.chat.interrupt import Interrupts


@pytest.fixture
def one_thread_until_it_waits() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("one_thread_until_it_waits")
def test_an_interrupt_is_noticed_by_a_loop_that_waits_already() -> None:
    """Sent to another thread it does not wake the one that waits, as one that comes between the
    loop's last look and its wait does not."""
    waits, late = threading.Event(), []

    def send() -> None:
        waits.wait()  # and for the loop's thread to let others go on, which its wait does
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)

    async def main() -> bool:
        loop: Any = asyncio.get_running_loop()
        loop.call_later(20, late.append, True)
        select, sender = loop._selector.select, threading.Thread(target=send)

        def tell(timeout: float | None) -> Any:
            if timeout is None or timeout > 1:
                waits.set()
            return select(timeout)

        loop._selector.select = tell
        sender.start()
        with Interrupts() as interrupts:
            finished = await interrupts.run(asyncio.Event().wait())  # type: ignore[arg-type]
        sender.join()
        return finished

    before = signal.getsignal(signal.SIGINT)
    assert asyncio.run(main()) is False
    assert not late
    assert signal.getsignal(signal.SIGINT) is before
