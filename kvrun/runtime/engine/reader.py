"""Reader: has prompts read by an encoder, and tells the rows of a step where to find theirs."""

from collections.abc import Iterator

import numpy as np
import torch

from kvrun.runtime.attention import Backend
from kvrun.runtime.batch import Batch
from kvrun.runtime.engine.scheduler import Row, Schedule
from kvrun.runtime.engine.slots import Slots
from kvrun.runtime.layers.encoder import EncoderDecoder
from kvrun.runtime.lora.bank import LoraBank
from kvrun.runtime.lora.rows import assigned, rows_of

# Tokens that the encoder reads at once, but for a single longer prompt.
AT_ONCE = 4096


class Reader:
    """A prompt is read in the step of its sequence's first row, before the decoder runs."""

    def __init__(
        self,
        model: EncoderDecoder,
        backend: Backend,
        slots: Slots,
        bank: LoraBank | None,
        block_size: int,
    ) -> None:
        self._model = model
        self._backend = backend
        self._slots = slots
        self._bank = bank
        self._size = block_size
        self._shown: list[tuple[list[int], int]] = []
        self._source: Batch | None = None

    def read(self, schedule: Schedule) -> None:
        """The encoder's part of a step. Again it writes the same rows of the cache again."""
        for rows in _passes([row for row in schedule if row.reads]):
            self._model.encode(self._prompts(rows))

    def source(self, schedule: Schedule) -> Batch:
        """Each row of a step as a sequence with one query over its prompt.

        The same object while the sequences stay the same: decoding moves nothing here.
        """
        shown = [(row.sequence.source_blocks, row.count) for row in schedule]
        old = self._shown
        same = len(old) == len(shown) and all(
            a is b and m == n for (a, m), (b, n) in zip(old, shown, strict=True)
        )
        if not same or self._source is None:
            self._source = self._of_rows(schedule)
            self._shown = shown
        return self._source

    def _prompts(self, rows: list[Row]) -> Batch:
        sequences = [row.sequence for row in rows]
        counts = [len(s.source) for s in sequences]
        positions = np.concatenate([np.arange(count) for count in counts])
        tables = [np.array(s.source_blocks, np.int64) for s in sequences]
        places = np.concatenate(
            [
                table[np.arange(count) // self._size] * self._size + np.arange(count) % self._size
                for table, count in zip(tables, counts, strict=True)
            ]
        )
        ids = [token for s in sequences for token in s.source]
        known, at, to, ends, lengths = self._slots.send(
            ids, positions, places, np.cumsum([0, *counts]), counts
        )
        nowhere = lengths.new_zeros(0, 0)
        batch = self._batch(known, at, to, lengths, ends, counts, counts, nowhere)
        adapters = assigned([s.adapter for s in sequences])
        if self._bank is not None and adapters is not None:
            of_row = np.repeat(adapters.slots, counts)
            batch.lora = rows_of(self._bank.resident, of_row, self._slots.send)
        return batch

    def _of_rows(self, schedule: Schedule) -> Batch:
        of_row = [row.sequence for row in schedule for _ in range(row.count)]
        # A probe has no prompt, and looks at the padding.
        lengths = [max(1, len(s.source)) for s in of_row]
        pages = -(-max(lengths) // self._size)
        tables = np.zeros((len(of_row), pages), np.int64)
        for table, sequence in zip(tables, of_row, strict=True):
            table[: len(sequence.source_blocks)] = sequence.source_blocks
        count, last = len(of_row), np.array(lengths) - 1
        sent = self._slots.send(last, np.arange(count + 1), lengths, tables.reshape(-1))
        nothing, ones = sent[0].new_zeros(0), [1] * count
        found = sent[3].view(count, pages)
        batch = self._batch(nothing, sent[0], nothing, sent[2], sent[1], ones, lengths, found)
        self._backend.plan(batch)
        return batch

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
    model: object, backend: Backend, slots: Slots, bank: LoraBank | None, block_size: int
) -> Reader | None:
    """None for a model without an encoder."""
    if not isinstance(model, EncoderDecoder):
        return None
    return Reader(model, backend, slots, bank, block_size)


def _passes(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows whose prompts are read together."""
    together: list[Row] = []
    tokens = 0
    for row in rows:
        if together and tokens + row.reads > AT_ONCE:
            yield together
            together, tokens = [], 0
        together.append(row)
        tokens += row.reads
    if together:
        yield together
