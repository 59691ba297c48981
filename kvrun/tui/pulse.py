"""Pulse: the engine's counters over time: speed, the share of prompts, what is resident."""

import time
from collections import deque
from dataclasses import dataclass

from kvrun.runtime.engine.request import Stats

KEPT = 240  # samples
BARS = " ▁▂▃▄▅▆▇█"
STEADY = 1.0  # seconds over which a rate is taken


@dataclass(frozen=True)
class Sample:
    at: float  # seconds, of a monotonic clock
    stats: Stats


class Pulse:
    """Takes a sample now and then; rates are those of the last second."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=KEPT)
        self._speeds: deque[float] = deque(maxlen=KEPT)

    def take(self, stats: Stats, at: float | None = None) -> None:
        """Take in the counters of a moment; those of a new engine begin anew."""
        sample = Sample(time.perf_counter() if at is None else at, stats)
        if self._samples and stats.steps < self._samples[-1].stats.steps:
            self._samples.clear()
        if self._samples:
            last = self._samples[-1]
            seconds = max(sample.at - last.at, 1e-6)
            made = stats.generated_tokens - last.stats.generated_tokens
            self._speeds.append(made / seconds)
        self._samples.append(sample)

    @property
    def now(self) -> Stats:
        return self._samples[-1].stats if self._samples else Stats()

    def rate(self, counter: str) -> float:
        """A counter's growth per second."""
        first, last = self._window()
        if first is None or last is None or last.at <= first.at:
            return 0.0
        grown = getattr(last.stats, counter) - getattr(first.stats, counter)
        return float(grown) / (last.at - first.at)

    @property
    def prefill_share(self) -> float | None:
        """Of the tokens computed of late, how many were of prompts; None when there were none."""
        prompt, made = self.rate("prompt_tokens"), self.rate("generated_tokens")
        return prompt / (prompt + made) if prompt + made > 0 else None

    @property
    def hit_rate(self) -> float | None:
        """Of all prompt tokens since the engine's start, how many the prefix cache held."""
        hits, computed = self.now.prefix_hit_tokens, self.now.prompt_tokens
        return hits / (hits + computed) if hits + computed else None

    def speeds(self, count: int) -> list[float]:
        """Generated tokens per second between the last samples, oldest first."""
        return list(self._speeds)[-count:]

    def _window(self) -> tuple[Sample | None, Sample | None]:
        if not self._samples:
            return None, None
        last = self._samples[-1]
        first = last
        for sample in reversed(self._samples):
            first = sample
            if last.at - sample.at >= STEADY:
                break
        return first, last


def sparkline(values: list[float], width: int) -> str:
    """Values as one line of bars, the newest at the right."""
    most = max(values, default=0.0)
    if not most:
        return "▁" * width
    bars = "".join(BARS[max(1, round(v / most * (len(BARS) - 1)))] for v in values[-width:])
    return bars.rjust(width, "▁")


def bar(share: float, width: int) -> str:
    """A share of 1 as a bar."""
    full = min(width, max(0, round(share * width)))
    return "█" * full + "░" * (width - full)
