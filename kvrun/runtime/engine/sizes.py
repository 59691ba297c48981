"""The sizes of an engine that depend on the device, where its configuration does not say them."""

from dataclasses import replace

import torch

from kvrun.runtime.config import EngineConfig

# Steps that a large batch takes between two looks of the host.
TURNS = 4


def sized(config: EngineConfig, device: torch.device) -> EngineConfig:
    """`config` with the sizes that depend on the kind of device filled in."""
    cpu = device.type == "cpu"
    ahead = config.run_ahead
    return replace(
        config,
        block_size=config.block_size or (16 if cpu else 64),
        max_num_seqs=config.max_num_seqs or _usual_seqs(device),
        max_num_batched_tokens=config.max_num_batched_tokens or (2048 if cpu else 8192),
        run_ahead=(0 if cpu else TURNS) if ahead is None else ahead,
    )


def _usual_seqs(device: torch.device) -> int:
    """How many sequences run at once unless a configuration says it."""
    if device.type != "cuda":
        return 256
    # A step of many costs each less, as long as their cache fits: 8B, 1,000 requests, on a GPU of
    # 80 GB, 1.17 times the tokens/s of 256. Logits take 16 bytes a sequence and word.
    memory = torch.cuda.get_device_properties(device).total_memory
    return 1024 if memory > 40 << 30 else 512 if memory > 20 << 30 else 256
