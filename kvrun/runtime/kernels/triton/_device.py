"""What kernels must know of the device they run on."""

from functools import cache

import torch


@cache
def sm_count(device: torch.device) -> int:
    """Programs that a device runs side by side, at least; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program can have. Source: CUDA programming guide, table of
    technical specifications by compute capability."""
    if device.type != "cuda":
        return 1 << 30
    large = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
    return large.get(torch.cuda.get_device_capability(device), 99) << 10
