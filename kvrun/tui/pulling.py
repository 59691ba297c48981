"""Pulling: fetch what a repository of the Hub holds while the screen goes on."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvrun.folder import load
from kvrun.hub.local import is_pullable
from kvrun.runtime.plan import size

if TYPE_CHECKING:
    from kvrun.hub.transfer import File

BETWEEN = 0.25  # seconds between two words about it


class Progress:
    """A pull's Watch that counts, for whoever looks; called from several threads."""

    def __init__(self) -> None:
        self.total = self.here = 0

    def begin(self, files: "list[File]") -> None:
        self.total = sum(file.size for file in files)

    def add(self, name: str, count: int) -> None:
        self.here += count

    def have(self, name: str, count: int) -> None:
        self.here += count

    def end(self, name: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass


async def pull(name: str, say: Callable[[str], None]) -> bool:
    """Fetch ORG/NAME[@REVISION] into the cache; False for what is no such name.

    `say` hears how far it is. Raises what hub.remote raises.
    """
    if not is_pullable(name):
        return False
    remote, progress = load("kvrun.hub", "remote"), Progress()
    say(f"looking for {name} ...")
    offer = await asyncio.to_thread(remote.look, name)
    work = asyncio.create_task(asyncio.to_thread(remote.pull, offer, progress))
    while not (await asyncio.wait({work}, timeout=BETWEEN))[0]:
        say(f"pulling {name}: {size(progress.here)} of {size(progress.total)}")
    await work
    return True
