"""Reader: has prompts read by an encoder, or images, and tells the rows of a step where to find
what they attend to."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from kvrun.runtime.attention import Backend
from kvrun.runtime.batch import Batch
from kvrun.runtime.engine.features import Features
from kvrun.runtime.engine.scheduler import Schedule
from kvrun.runtime.engine.sequence import Sequence, Source
from kvrun.runtime.engine.slots import Slots
from kvrun.runtime.layers.cross import CrossDecoder
from kvrun.runtime.lora.bank import LoraBank
from kvrun.runtime.lora.rows import assigned, rows_of

# Rows of sources that are read at once, but for a single longer one.
AT_ONCE = 4096


class _Unread(NamedTuple):
    """A source of a sequence, and the blocks where its keys and values go."""

    sequence: Sequence
    source: Source
    blocks: list[int]


class Reader:
    """Sources are read in the step of their sequence's first row, before the decoder runs."""

    def __init__(
        self,
        model: CrossDecoder,
        backend: Backend,
        slots: Slots,
        bank: LoraBank | None,
        block_size: int,
        features: Features | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._slots = slots
        self._bank = bank
        self._size = block_size
        self._features = features
        self._shown: list[tuple[list[int] | None, int]] = []
        self._source: Batch | None = None
        self._rows: torch.Tensor | None = None

    def read(self, schedule: Schedule) -> None:
        """The sources' part of a step. Again it writes the same rows of the cache again."""
        for work in _passes(schedule):
            self._model.encode(self._batch_of(work))

    def show(self, schedule: Schedule, batch: Batch) -> None:
        """Have the rows of a step find what they attend to: neighbours with the same source are a
        sequence over it, and those without one are left out.

        The same objects while the sequences stay the same: decoding moves nothing here.
        """
        shown: list[tuple[list[int] | None, int]] = []
        lengths: list[int] = []
        for row in schedule:
            sequence = row.sequence
            for count, which in sequence.runs(row.start, row.count):
                shown.append((None if which is None else sequence.source_blocks[which], count))
                lengths.append(0 if which is None else sequence.sources[which].rows)
        old = self._shown
        same = len(old) == len(shown) and all(
            a is b and m == n for (a, m), (b, n) in zip(old, shown, strict=True)
        )
        if not same:
            self._source, self._rows = self._of_runs(shown, lengths)
            self._shown = shown
        batch.source, batch.source_rows = self._source, self._rows

    def _batch_of(self, work: list[_Unread]) -> Batch:
        sources, sequences = [one.source for one in work], [one.sequence for one in work]
        counts = [source.rows for source in sources]
        positions = [np.arange(count) for count in counts]
        tables = [np.array(one.blocks, np.int64) for one in work]
        places = [
            table[at // self._size] * self._size + at % self._size
            for table, at in zip(tables, positions, strict=True)
        ]
        ids = [token for source in sources for token in source.ids or [0] * source.rows]
        known, at, to, ends, lengths = self._slots.send(
            ids, np.concatenate(positions), np.concatenate(places), np.cumsum([0, *counts]), counts
        )
        nowhere = lengths.new_zeros(0, 0)
        batch = self._batch(known, at, to, lengths, ends, counts, counts, nowhere)
        images = [source.image for source in sources if source.image is not None]
        if images and self._features is not None:
            batch.image_states = torch.cat([self._features.look(image) for image in images])
        adapters = assigned([sequence.adapter for sequence in sequences])
        if self._bank is not None and adapters is not None:
            of_row = np.repeat(adapters.slots, counts)
            batch.lora = rows_of(self._bank.resident, of_row, self._slots.send)
        return batch

    def _of_runs(
        self, shown: list[tuple[list[int] | None, int]], lengths: list[int]
    ) -> tuple[Batch | None, torch.Tensor | None]:
        """A planned batch over sources, and which rows of the step are its own; None: all are."""
        total = sum(count for _, count in shown)
        lengths = [length for length in lengths if length]
        runs = [(blocks, count) for blocks, count in shown if blocks is not None]
        if not runs:
            return None, None
        counts = [count for _, count in runs]
        pages = -(-max(lengths) // self._size)
        tables = np.zeros((len(runs), pages), np.int64)
        for table, (blocks, _) in zip(tables, runs, strict=True):
            table[: len(blocks)] = blocks
        # Each row sees all, as the last token of a sequence does.
        last = np.repeat(lengths, counts) - 1
        seeing = np.repeat([blocks is not None for blocks, _ in shown], [n for _, n in shown])
        at, ends, context, flat, rows = self._slots.send(
            last, np.cumsum([0, *counts]), lengths, tables.reshape(-1), np.flatnonzero(seeing)
        )
        nothing, found = at.new_zeros(0), flat.view(len(runs), pages)
        batch = self._batch(nothing, at, nothing, context, ends, counts, lengths, found)
        self._backend.plan(batch)
        return batch, None if len(rows) == total else rows

    def _batch(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        context: torch.Tensor,
        ends: torch.Tensor,
        counts: list[int],
        lengths: list[int],
        tables: torch.Tensor,
    ) -> Batch:
        return Batch(
            ids=ids,
            positions=positions,
            slot_mapping=places,
            block_tables=tables,
            cu_seqlens=ends,
            context_lens=context,
            last_rows=ids[:0],
            query_lens_host=counts,
            context_lens_host=lengths,
            block_size=self._size,
            backend=self._backend,
        )


def reader(
    model: object,
    backend: Backend,
    slots: Slots,
    bank: LoraBank | None,
    block_size: int,
    features: Features | None,
) -> Reader | None:
    """None for a model that attends to nothing but its own tokens."""
    if not isinstance(model, CrossDecoder):
        return None
    return Reader(model, backend, slots, bank, block_size, features)


def _passes(schedule: Schedule) -> Iterator[list[_Unread]]:
    """Sources that are read together."""
    together: list[_Unread] = []
    rows = 0
    for row in schedule:
        for source, blocks in row.sequence.unread if row.reads else ():
            if together and rows + source.rows > AT_ONCE:
                yield together
                together, rows = [], 0
            together.append(_Unread(row.sequence, source, blocks))
            rows += source.rows
    if together:
        yield together
