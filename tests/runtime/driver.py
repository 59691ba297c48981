"""Drives a Decoder by hand: batches from (ids, start) per sequence, with a trivial allocator."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kvrun.runtime.attention import Backend
from kvrun.runtime.attention.sdpa import Attention
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.states import StateCache
from kvrun.runtime.cache.tensors import KVCache
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.models import build
from kvrun.runtime.parallel import Group


@dataclass
class Part:
    """New tokens of one sequence: `start` are in the cache already, in `blocks`."""

    ids: Sequence[int]
    start: int
    blocks: Sequence[int]


def make_batch(
    parts: Sequence[Part], block_size: int, backend: Backend, *, shift: int = 0
) -> Batch:
    """A planned Batch that wants the logits of every row. `shift` falsifies positions."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    ends = [0]
    for part in parts:
        places = range(part.start, part.start + len(part.ids))
        ids += part.ids
        positions += places
        slots += [part.blocks[p // block_size] * block_size + p % block_size for p in places]
        ends.append(len(ids))
    lengths = [part.start + len(part.ids) for part in parts]
    pages = max(-(-length // block_size) for length in lengths)
    tables = [(list(part.blocks) + [0] * pages)[:pages] for part in parts]
    batch = Batch(
        ids=torch.tensor(ids),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        block_tables=torch.tensor(tables),
        cu_seqlens=torch.tensor(ends),
        context_lens=torch.tensor(lengths),
        last_rows=torch.arange(len(ids)),
        query_lens_host=[len(part.ids) for part in parts],
        context_lens_host=lengths,
        block_size=block_size,
        backend=backend,
    )
    backend.plan(batch)
    batch.positions = batch.positions + shift
    return batch


@dataclass
class Driver:
    """A model, a cache and sequences by number."""

    folder: Path
    block_size: int = 4
    num_blocks: int = 200
    dtype: torch.dtype = torch.float32
    group: Group = field(default_factory=Group)
    scattered: bool = True
    load_format: str = "auto"
    quantize: str | None = None
    backend_type: type[Backend] = Attention

    def built(self) -> Decoder:
        checkpoint = Checkpoint(
            self.folder,
            dtype=self.dtype,
            group=self.group,
            load_format=self.load_format,
            quantize=self.quantize,
        )
        return build(checkpoint)

    def __post_init__(self) -> None:
        self.model = self.built()
        cpu = torch.device("cpu")
        self.backend = self.backend_type(
            KVCache(self.model.specs, self.num_blocks, self.block_size, self.dtype, cpu),
            self.dtype,
        )
        self.states = StateCache(self.model.states, 8, self.dtype, cpu)
        self.slots = torch.empty(0, dtype=torch.int64)  # of the last batch
        self.free = list(range(1, self.num_blocks))
        if self.scattered:
            random.Random(0).shuffle(self.free)
        self.lengths: dict[int, int] = {}
        self.blocks: dict[int, list[int]] = {}

    def share(self, source: int, target: int, tokens: int) -> None:
        """`target` begins with the first `tokens` tokens of `source`, in the same blocks."""
        assert tokens % self.block_size == 0
        self.blocks[target] = self.blocks[source][: tokens // self.block_size]
        self.lengths[target] = tokens

    def batch(self, work: Sequence[tuple[int, Sequence[int]]], shift: int = 0) -> Batch:
        parts = []
        for sequence, ids in work:
            start = self.lengths.get(sequence, 0)
            blocks = self.blocks.setdefault(sequence, [])
            while len(blocks) * self.block_size < start + len(ids):
                blocks.append(self.free.pop(0))
            parts.append(Part(ids, start, blocks))
            self.lengths[sequence] = start + len(ids)
        batch = make_batch(parts, self.block_size, self.backend, shift=shift)
        if self.model.states:  # a sequence's number is its slot
            self.slots = torch.tensor([sequence for sequence, _ in work])
            batch.recurrent = self.states.rows(self.slots, batch.cu_seqlens, batch.context_lens)
        return batch

    def prepared(self, work: Sequence[tuple[int, Sequence[int]]], shift: int = 0) -> Batch:
        """A batch, and all that must have happened before the model sees it."""
        return self.batch(work, shift)

    @torch.inference_mode()
    def step(self, work: Sequence[tuple[int, Sequence[int]]], shift: int = 0) -> list[torch.Tensor]:
        """Run one step; the logits [tokens, vocab] of each sequence's new tokens."""
        logits = self.model.capped(self.model(self.prepared(work, shift)))
        self.states.commit(self.slots)
        return list(logits.split([len(ids) for _, ids in work]))
