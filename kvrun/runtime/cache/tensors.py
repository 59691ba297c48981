"""KVCache: the tensors that hold keys and values, one per layer, in blocks of tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from kvrun.runtime.attention import AttentionSpec


class KVCache:
    """Per layer one tensor [num_blocks * block_size, row].

    A row is a token's keys of all heads, then its values, or the latent of both: written by one
    copy, and a block is one stretch of memory. Rows start as zeros. On CPU a large cache costs
    memory only as it fills.
    """

    def __init__(
        self,
        specs: Sequence["AttentionSpec"],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.device = device
        rows = num_blocks * block_size
        widths = {spec.layer: spec.row for spec in specs}
        self._layers = {
            layer: _zeros(rows, width, dtype, device) for layer, width in widths.items()
        }

    @property
    def widest_row(self) -> int:
        """Bytes of a token's keys and values in the layer that has the most."""
        return max(tensor.stride(0) * tensor.itemsize for tensor in self._layers.values())

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero blocks that may hold NaN or infinity, before another sequence gets them.

        What lies beyond a sequence's end weighs nothing, but nothing times NaN is NaN.
        """
        for layer, tensor in self._layers.items():
            ids = torch.tensor(list(blocks), device=tensor.device)
            _bits(self.blocks(layer)).index_fill_(0, ids, 0)

    def store(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Put kv [tokens, ...], all keys before all values, into `slots`."""
        rows, new = self._layers[layer], kv.flatten(1)
        if rows.dtype is not new.dtype:
            most = torch.finfo(rows.dtype).max
            new = new.clamp(-most, most).to(rows.dtype)
        _bits(rows).index_copy_(0, slots, _bits(new))

    def gather(self, layer: int, blocks: torch.Tensor) -> torch.Tensor:
        """Copies of `blocks` [n] as [n, block_size * row]"""
        found = self.blocks(layer)
        return _bits(found).index_select(0, blocks).view(found.dtype)

    def rows(self, layer: int) -> torch.Tensor:
        """[slots, row]"""
        return self._layers[layer]

    def blocks(self, layer: int) -> torch.Tensor:
        """[num_blocks, block_size * row], the same memory"""
        return self._layers[layer].view(self.num_blocks, -1)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats as bytes: torch cannot index them."""
    return tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor


def _zeros(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros((rows, width), dtype=dtype, device=device)
    # torch.zeros writes every page; numpy gets them zeroed from the system, on first use.
    memory = np.zeros(rows * width * dtype.itemsize, np.uint8)
    return torch.from_numpy(memory).view(dtype).view(rows, width)


def bytes_per_block(specs: Sequence["AttentionSpec"], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes in all layers together."""
    widths = {spec.layer: spec.row for spec in specs}
    return block_size * sum(widths.values()) * dtype.itemsize
