"""StepTimes: how long the steps of an engine take, and how many sequences they hold."""

import time
from bisect import bisect_left

from kvrun.runtime.engine.request import Seconds, Stats
from kvrun.runtime.engine.scheduler import Schedule


class StepTimes:
    """Writes to `stats`. A step counts from when it was submitted, or from when the one before it
    had landed if that was later: then it had waited for the device.
    """

    def __init__(self, stats: Stats) -> None:
        self._stats = stats
        self._landed = 0.0

    @staticmethod
    def now() -> float:
        return time.perf_counter()

    def took(self, schedule: Schedule, submitted: float) -> None:
        """A step has landed now; each of its turns counts as a step of its own."""
        turns = schedule[0].turns
        landed = self.now()
        seconds = (landed - max(submitted, self._landed)) / turns
        self._landed = landed
        prompts = any(row.start < row.sequence.prompt_len for row in schedule)
        times = self._stats.prompt_steps if prompts else self._stats.decode_steps
        times.counts[bisect_left(Seconds.BOUNDS, seconds)] += turns
        times.sum += seconds * turns
        sizes = self._stats.step_sizes
        sizes[len(schedule)] = sizes.get(len(schedule), 0) + turns
