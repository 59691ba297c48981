"""A measured time beside the least it could have been: rates, and shares of the roofline."""

from dataclasses import dataclass
from typing import Any

from kvrun.bench.roofline import Ceilings, Work


@dataclass(frozen=True)
class Limits:
    """What the machine was measured to do, and what its maker promises; None where not known."""

    measured: Ceilings | None = None
    datasheet: Ceilings | None = None

    def beside(self, work: Work, seconds: float) -> dict[str, Any]:
        """The columns that stand beside a time; percentages are bound / measured time."""
        return {
            "gb_per_s": work.bytes / seconds / 1e9,
            "tflop_per_s": work.flops / seconds / 1e12,
            **shares(
                work.seconds(self.measured) if self.measured else None,
                work.seconds(self.datasheet) if self.datasheet else None,
                seconds,
            ),
        }


def shares(bound: float | None, promised: float | None, seconds: float) -> dict[str, Any]:
    """A bound from measured ceilings and one from the datasheet, in seconds, beside a time."""
    return {
        "bound_ms": None if bound is None else 1e3 * bound,
        "roofline_percent": None if bound is None else 100 * bound / seconds,
        "datasheet_percent": None if promised is None else 100 * promised / seconds,
    }
