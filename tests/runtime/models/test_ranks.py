"""Two ranks, each with its own cut of every tensor, give the logits that one gives."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kvrun.runtime.parallel import Group
from tests.runtime.driver import Driver

PROMPT = list(range(3, 20))


@dataclass
class Sum:
    """The sum of what two threads bring, handed to both; an error of one frees the other."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=60))
    parts: list[Any] = field(default_factory=lambda: [None, None])

    def of(self, rank: int, x: torch.Tensor) -> torch.Tensor:
        self.parts[rank] = x
        self.barrier.wait()
        total: torch.Tensor = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return total

    def both(self, compute: Callable[[int], Any]) -> list[Any]:
        """What two ranks compute side by side, or the error it ends with."""
        found: list[Any] = [None, None]

        def run(rank: int) -> None:
            try:
                found[rank] = compute(rank)
            except Exception as error:
                found[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


@dataclass(frozen=True)
class Threads(Group):
    """Ranks that are threads of this process."""

    size: int = 2
    sum: Any = None

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return self.sum.of(self.rank, x)  # type: ignore[no-any-return]


def logits(driver: Driver) -> torch.Tensor:
    rows = driver.step([(0, PROMPT[:-2])])
    for token in PROMPT[-2:]:
        rows += driver.step([(0, [token])])
    return torch.cat(rows)


def ranks(folder: Path) -> list[Any]:
    """What each of two ranks computes, or the error it ends with."""
    total = Sum()
    return total.both(lambda rank: logits(Driver(folder, group=Threads(rank, sum=total))))


def test_two_ranks_are_one_model(model: tuple[Path, Any]) -> None:
    folder, _ = model
    whole = logits(Driver(folder))
    for part in ranks(folder):
        if isinstance(part, Exception):
            raise part
        assert (part - whole).abs().max() <= 1e-4
