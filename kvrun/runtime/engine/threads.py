"""Threads: on how many CPU threads a step runs, by what steps like it have taken.

Threads that work together wait for each other at each of some 200 places in a step. That costs a
small step more than it gains, and next to a busy program a turn of the scheduler each time; how
much, depends on the machine and on the moment. So it is measured while steps run.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import psutil
import torch

# Parameters times tokens of steps that are tried with several counts. Below, there is little to
# gain; a step of one request took tiny, 7 million, at best 1.55 ms on two threads and 2.20 on one,
# in the middle of noisy runs the same. Above, a single thread would hold up an answer only to be
# tried.
SMALLEST, LARGEST = 5_000_000, 2_000_000_000
TRIES = 3  # of a count before it is judged, by their median: the first may start threads
CLEARLY = 1.5  # times as slow as the best: no need to try it again, nor even fewer threads
KEPT = 5  # steps by which a count in use is judged
# Steps until other counts are tried again. Twice as long each time that they are slower still.
SHORTEST, LONGEST = 32, 128


class Threads:
    """A context in which a step of so many tokens runs on as many threads as suit it best."""

    def __init__(
        self,
        asked: int | None,
        parameters: int,
        cores: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`asked`: always so many. `cores`: at most; None: those of this machine, or fewer where
        torch has been told so."""
        most = asked or cores or min(psutil.cpu_count(logical=False) or 1, torch.get_num_threads())
        self._counts = [asked] if asked else sorted({1, max(1, most // 2), most})
        self._parameters = parameters
        self._clock = clock
        self._kinds: dict[int, _Kind] = {}  # by the bits of a number of tokens

    @contextmanager
    def __call__(self, tokens: int) -> Iterator[None]:
        before, kind = torch.get_num_threads(), None
        work = self._parameters * tokens
        if len(self._counts) == 1 or work < SMALLEST:
            count = self._counts[0]
        elif work > LARGEST:
            count = self._counts[-1]
        else:
            kind = self._kinds.setdefault(tokens.bit_length(), _Kind(self._counts))
            count = kind.choose()
        torch.set_num_threads(count)
        begun = self._clock()
        try:
            yield
            if kind is not None:
                kind.took(count, self._clock() - begun)
        finally:
            torch.set_num_threads(before)


class _Kind:
    """Steps of about as many tokens: what they took by counts of threads, and which is next."""

    def __init__(self, counts: list[int]) -> None:
        self._taken: dict[int, list[float]] = {count: [] for count in reversed(counts)}
        self._best = counts[-1]
        self._pause = self._left = SHORTEST

    def choose(self) -> int:
        for count in self._taken:
            if not self._judged(count):
                return count
        best = min(self._taken, key=lambda count: median(self._taken[count]))
        if best != self._best:
            self._best, self._pause = best, SHORTEST
            self._left = min(self._left, SHORTEST)
        self._left -= 1
        if self._left < 0:
            self._pause = self._left = min(2 * self._pause, LONGEST)
            self._taken.update({count: [] for count in self._taken if count != best})
            return self.choose()
        return best

    def took(self, count: int, seconds: float) -> None:
        self._taken[count] = [*self._taken[count], seconds][-KEPT:]
        if count < self._best and self._clearly_slow(count):
            fewer = [other for other, taken in self._taken.items() if other < count and not taken]
            self._taken.update({other: [seconds] for other in fewer})

    def _judged(self, count: int) -> bool:
        return len(self._taken[count]) >= TRIES or self._clearly_slow(count)

    def _clearly_slow(self, count: int) -> bool:
        """Whether all that is known of it is slow, beside what is known well."""
        known = [median(taken) for taken in self._taken.values() if len(taken) >= TRIES]
        taken = self._taken[count]
        return bool(taken and known) and min(taken) > CLEARLY * min(known)
