"""This machine's memory and devices, as far as they are known without importing torch."""

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil

CPUINFO = Path("/proc/cpuinfo")
QUERY = ("nvidia-smi", "--query-gpu=name,memory.free,memory.total",
         "--format=csv,noheader,nounits")  # fmt: skip
PATIENCE = 10.0  # seconds for a driver that is slow to wake up


class Device(NamedTuple):
    """Where a model would run: its name, bytes that are free and that there are."""

    name: str
    on_cpu: bool
    free: int
    total: int


def device() -> Device:
    """The first visible GPU, else the CPU."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    first = (visible or "").split(",")[0].strip()
    if visible is None or first not in ("", "-1"):
        found = gpus(("-i", first) if first else ())
        if found:
            return found[0]
    memory = psutil.virtual_memory()
    return Device("CPU", True, int(memory.available), int(memory.total))


def gpus(which: tuple[str, ...] = ()) -> list[Device]:
    """NVIDIA's cards by their driver; none where there is no driver."""
    try:
        done = subprocess.run(
            [*QUERY, *which], capture_output=True, text=True, timeout=PATIENCE, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    found = []
    for line in done.stdout.splitlines():
        name, free, total = (part.strip() for part in line.rsplit(",", 2))
        if free.isdigit() and total.isdigit():
            found.append(Device(name, False, int(free) << 20, int(total) << 20))
    return found


def itemsize(stored: str | None, on_cpu: bool) -> int:
    """Bytes of a value as it would be computed with, as kvrun's dtype "auto" chooses."""
    if stored not in ("bfloat16", "float16"):
        return 4
    if not on_cpu:
        return 2
    try:
        flags = CPUINFO.read_text(errors="replace")
    except OSError:
        return 4
    native = "avx512_bf16" in flags or "amx_tile" in flags
    return 2 if native and stored == "bfloat16" else 4
