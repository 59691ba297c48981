"""Which form of a kernel a device runs: Triton on CUDA; elsewhere C, or the plain-torch twin."""

from functools import cache
from types import ModuleType

import torch

from kvrun import folder
from kvrun.runtime import kernels

TRITON = f"{kernels.__name__}.triton"
NATIVE = f"{kernels.__name__}.native"


def kernel(name: str, device: torch.device) -> ModuleType:
    """The module of kernel `name` for tensors on `device`."""
    return folder.load(TRITON if device.type == "cuda" else kernels.__name__, name)


def fused(name: str, device: torch.device) -> ModuleType | None:
    """A kernel that takes the place of several operators: on CUDA, and in C if there is one."""
    if device.type == "cuda":
        return kernel(name, device)
    return native(name) if device.type == "cpu" and name in folder.names(NATIVE) else None


@cache
def native(name: str) -> ModuleType | None:
    """The form of a kernel that is compiled for this CPU; None where that cannot be done."""
    module = folder.load(NATIVE, name)
    return module if module.available() else None
