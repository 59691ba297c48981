"""Hardware: the ceilings of this machine, measured once and kept."""

import json
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import platformdirs
import torch

from kvrun.bench import cpu_rates, cuda_rates
from kvrun.bench.datasheet import promised
from kvrun.bench.rates import BANDWIDTH, FLOPS, Rate
from kvrun.bench.roofline import Ceilings
from kvrun.errors import InvalidRequest
from kvrun.runtime.config import DEVICES
from kvrun.runtime.engine.start import choose_device

CPUINFO = Path("/proc/cpuinfo")

Watch = Callable[[str], None]


@dataclass(frozen=True)
class Hardware:
    """A device, and its rates as they were measured at `date`."""

    device: str  # "cpu", "cuda", "cuda:1"
    device_name: str
    threads: int  # of torch on a CPU, 0 elsewhere
    torch: str
    date: str
    rates: tuple[Rate, ...] = ()

    def ceilings(self, dtype: str) -> Ceilings:
        """The best memory rate of any kind, and the product of a dtype (float16 as bfloat16)."""
        memory = max(rate.value for rate in self.rates if rate.unit == BANDWIDTH)
        products = {rate.name: rate.value for rate in self.rates if rate.unit == FLOPS}
        return Ceilings(memory, products[dtype if dtype in products else "bfloat16"])

    def promised(self, dtype: str) -> Ceilings | None:
        """What its datasheet says."""
        return promised(self.device_name, dtype)

    def line(self, dtype: str) -> str:
        """One line for people."""
        at = self.ceilings(dtype)
        threads = f", {self.threads} threads" if self.threads else ""
        return (
            f"{self.device_name}{threads}: {at.bandwidth / 1e9:,.4g} GB/s, "
            f"{at.flops / 1e12:.3g} TFLOP/s in {dtype}, measured {self.date}"
        )

    def record(self) -> dict[str, Any]:
        """For JSON: every rate in bytes/s, FLOP/s or seconds."""
        return {**asdict(self), "rates": [asdict(rate) for rate in self.rates]}


def here(device: str = "auto") -> Hardware:
    """The device that would be used, nothing measured. Raises Unsupported if it is not there."""
    if device.split(":")[0] not in DEVICES:
        raise InvalidRequest(f"device is '{device}'.", hint=f"one of: {', '.join(DEVICES)}")
    chosen = choose_device(device)
    on_cpu = chosen.type == "cpu"
    return Hardware(
        device=str(chosen),
        device_name=_cpu_name() if on_cpu else torch.cuda.get_device_name(chosen),
        threads=torch.get_num_threads() if on_cpu else 0,
        torch=torch.__version__,
        date=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


def measured(
    device: str = "auto",
    *,
    quick: bool = False,
    scale: float = 1.0,
    watch: Watch = lambda text: None,
) -> Hardware:
    """Measure the device now and keep the result. `quick`: only what limits are computed from."""
    bare = here(device)
    measure = (cpu_rates if bare.device == "cpu" else cuda_rates).measure
    rates: list[Rate] = []
    for rate in measure(torch.device(bare.device), quick=quick, scale=scale):
        rates.append(rate)
        watch(f"{rate.name}: {rate.shown:.3g} {rate.unit}")
    hardware = replace(bare, rates=tuple(rates))
    _keep(hardware)
    return hardware


def known(
    device: str = "auto", *, scale: float = 1.0, watch: Watch = lambda text: None
) -> Hardware:
    """The device with its rates: as they were measured last time, else measured quickly now."""
    bare = here(device)
    try:
        kept = json.loads(_place(bare).read_text(encoding="utf-8"))
        rates = tuple(Rate(r["name"], r["unit"], float(r["value"])) for r in kept["rates"])
        hardware = replace(bare, rates=rates, date=str(kept["date"]))
        hardware.ceilings("float32")
    except (OSError, ValueError, KeyError, TypeError):
        return measured(device, quick=True, scale=scale, watch=watch)
    return hardware


def _keep(hardware: Hardware) -> None:
    place = _place(hardware)
    # A home that cannot be written to costs a measurement each time, and nothing else.
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(hardware.record(), indent=1), encoding="utf-8")


def _place(hardware: Hardware) -> Path:
    words = (hardware.device_name, str(hardware.threads), hardware.torch)
    name = re.sub(r"[^A-Za-z0-9.+-]+", "-", "_".join(words))
    return platformdirs.user_cache_path("kvrun") / "ceilings" / f"{name}.json"


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()
