"""Batch: all tensors of one forward."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from kvrun.runtime.attention import Backend
    from kvrun.runtime.cache.states import Rows as StateRows
    from kvrun.runtime.lora.rows import Rows


@dataclass
class Batch:
    """One step: `T` tokens of `B` sequences, packed one sequence after the other.

    Sequence b has its query tokens at rows cu_seqlens[b] : cu_seqlens[b + 1] and context_lens[b]
    tokens of context, the query tokens included. Page p of sequence b lies in block
    block_tables[b, p]; rows are padded with block 0, which belongs to nobody. The lists of plain
    ints say the same to the host, so that planning never waits for a device.
    """

    ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    slot_mapping: torch.Tensor  # [T] int64: block * block_size + offset of each token's K and V
    block_tables: torch.Tensor  # [B, pages] int64
    cu_seqlens: torch.Tensor  # [B + 1] int64
    context_lens: torch.Tensor  # [B] int64
    last_rows: torch.Tensor  # [S] int64: rows whose logits are wanted
    query_lens_host: list[int]
    context_lens_host: list[int]  # empty in a captured step, where they change with every replay
    block_size: int
    backend: "Backend"
    plan: Any = field(default=None)  # the backend's own
    lora: "Rows | None" = None  # which rows use adapters; None: none does
    recurrent: "StateRows | None" = None  # where recurrent layers have their states
    state_rows: torch.Tensor | None = None  # [P] int64: rows whose last states are wanted
    states: torch.Tensor | None = None  # [P, hidden]: these, once the model has run
    image_rows: torch.Tensor | None = None  # [I] int64: rows that stand for images,
    image_states: torch.Tensor | None = None  # [I, hidden]: and what stands in them
    # Its rows, or `source_rows` [R] int64 of them, as sequences over what they attend to beside
    # their own tokens: what an encoder has made of a prompt, or eyes of an image.
    source: "Batch | None" = None
    source_rows: torch.Tensor | None = None
    # What a layer computed once for all layers that share it (rotary tables), by that layer.
    shared: dict[Any, Any] = field(default_factory=dict)
