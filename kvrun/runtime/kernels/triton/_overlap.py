"""Programmatic dependent launch: a kernel starts, and reads weights, while the one before it ends.

Every kernel of a step takes part: it calls `wait` before it touches anything that an earlier
kernel writes or reads, and `release` once it has little left to do. A kernel that is launched
without these options waits for everything before it, as usual.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@cache
def overlap(device: torch.device) -> dict[str, Any]:
    """Launch arguments of a kernel that has a `PDL` constexpr: on from Hopper (sm_90) on."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def wait(PDL: tl.constexpr):
    """What earlier kernels have written is visible from here on, and they read no more."""
    if PDL:
        gdc_wait()


@triton.jit
def release(PDL: tl.constexpr):
    """The next kernel may start its work that depends on nothing."""
    if PDL:
        gdc_launch_dependents()
