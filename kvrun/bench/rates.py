"""Rate: one thing a machine does, how fast, and in which unit."""

from dataclasses import dataclass

BANDWIDTH = "GB/s"  # of memory: a ceiling
FLOPS = "TFLOP/s"  # of a matrix product in the dtype it is named for: a ceiling
LINK = "GB/s link"  # between host and device
TIME = "µs"
SCALES = {BANDWIDTH: 1e9, FLOPS: 1e12, LINK: 1e9, TIME: 1e-6}


@dataclass(frozen=True)
class Rate:
    """`value` in bytes/s, FLOP/s or seconds; `unit` is what people read it in."""

    name: str
    unit: str
    value: float

    @property
    def shown(self) -> float:
        """The value in its unit."""
        return self.value / SCALES[self.unit]
