"""What a process may take that reads files nobody has checked: memory, disk, time with a parent.

It opens no sockets of its own accord, and the token of the Hub is not in its environment.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

STATM = Path("/proc/self/statm")


def confine(more: int, largest_file: int) -> None:
    """Allow `more` bytes of memory than there are now, and files of so many bytes.

    Where the platform does not say how much there is now, memory is not limited.
    """
    Thread(target=_end_with_parent, daemon=True).start()
    if resource is None:
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _lower(resource.RLIMIT_FSIZE, largest_file)
        pages = int(STATM.read_text().split()[0])
        _lower(resource.RLIMIT_AS, pages * resource.getpagesize() + more)


def tell(**values: Any) -> None:
    """A line to the parent."""
    print(json.dumps(values), flush=True)


def _lower(kind: int, wanted: int) -> None:
    _, most = resource.getrlimit(kind)
    least = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    resource.setrlimit(kind, (least, least))


def _end_with_parent() -> None:
    while os.read(0, 1 << 10):  # ends when the parent does, killed or not
        pass
    os._exit(1)
