"""ModelRunner: one rank's model, caches and sampler; turns a schedule into a submitted step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, cast

import numpy as np
import torch

from kvrun.runtime.attention import Backend
from kvrun.runtime.batch import Batch
from kvrun.runtime.engine.request import Logprob, Request
from kvrun.runtime.engine.scheduler import Drawn, Row, Schedule
from kvrun.runtime.engine.sequence import Sequence as Running
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.sampling.sampler import Prepared, Sampled, Sampler, SampleRow


@dataclass
class Ticket:
    """A submitted step. Its tokens are on the device; `read` waits for them."""

    schedule: Schedule
    sampled: Sampled | None

    def read(self) -> list[Drawn | None]:
        """What each row of the schedule has drawn; None for rows that do not sample."""
        drawn: list[Drawn | None] = [None] * len(self.schedule)
        if self.sampled is None:
            return drawn
        ids, finite = self.sampled.ids.tolist(), self.sampled.finite.tolist()
        logprobs = self._logprobs(ids)
        wanted = [i for i, row in enumerate(self.schedule) if row.sample]
        for place, index in enumerate(wanted):
            drawn[index] = Drawn(ids[place], finite[place], logprobs[place])
        return drawn

    def _logprobs(self, ids: list[int]) -> Sequence[Logprob | None]:
        if self.sampled is None or self.sampled.logprobs is None:
            return [None] * len(ids)
        chosen, top_ids, top = (tensor.tolist() for tensor in self.sampled.logprobs)
        found: list[Logprob | None] = []
        for place, row in enumerate(row for row in self.schedule if row.sample):
            count = row.sequence.request.params.logprobs
            if count is None:
                found.append(None)
                continue
            pairs = list(zip(top_ids[place][:count], top[place][:count], strict=True))
            found.append(Logprob(ids[place], chosen[place], pairs))
        return found


@dataclass
class _Tables:
    """Block tables on the host, one row a slot; a row is rewritten only where it has grown."""

    rows: np.ndarray
    lists: list[list[int] | None] = field(default_factory=list)
    written: list[int] = field(default_factory=list)

    @classmethod
    def empty(cls, slots: int, pages: int) -> "_Tables":
        return cls(np.zeros((slots, pages), np.int64), [None] * slots, [0] * slots)

    def update(self, slot: int, blocks: list[int]) -> None:
        # A sequence that starts anew brings a new list; while it runs, its list only grows.
        if self.lists[slot] is not blocks:
            self.lists[slot], self.written[slot] = blocks, 0
            # What pads a neighbour's pages is read too, and must not be somebody else's block.
            self.rows[slot] = 0
        start = self.written[slot]
        if start < len(blocks):
            self.rows[slot, start : len(blocks)] = blocks[start:]
            self.written[slot] = len(blocks)


class _Drawing(NamedTuple):
    """The sequences of a step that draw a token, its place in each, and their slots."""

    sequences: list[Running]
    positions: torch.Tensor  # [S]
    slots: torch.Tensor  # [S]


class ModelRunner:
    """Fills a Batch from a schedule, runs the model, samples; nothing is read back here.

    Sampled ids stay on the device in `_last` [slots], where the next step finds the input of a
    sequence whose last token the host does not know yet.
    """

    def __init__(
        self,
        model: Callable[[Batch], torch.Tensor],
        backend: Backend,
        sampler: Sampler,
        *,
        device: torch.device,
        block_size: int,
        max_num_seqs: int,
        max_model_len: int,
        eos_ids: tuple[int, ...],
        threads: Callable[[int], int] | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._sampler = sampler
        self._device = device
        self._size = block_size
        self._eos = eos_ids
        self._threads = threads  # tokens of a step -> CPU threads it is worth; None: leave them
        self._last = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._tables = _Tables.empty(max_num_seqs, -(-max_model_len // block_size))
        self._prepared: Prepared | None = None
        self._prepared_for: list[Running] = []

    def submit(self, schedule: Schedule) -> Ticket:
        """Queue one step. Submitting the same rows again writes the same cache slots again."""
        if self._threads is None:
            return self._submit(schedule)
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads(sum(row.count for row in schedule)))
        try:
            return self._submit(schedule)
        finally:
            torch.set_num_threads(before)

    @torch.inference_mode()
    def _submit(self, schedule: Schedule) -> Ticket:
        batch, drawing = self._batch(schedule)
        self._backend.plan(batch)
        logits = self._model(batch)
        if drawing is None:
            return Ticket(schedule, None)
        prepared = self._prepare(drawing.sequences)
        sampled = self._sampler.sample(logits.float(), prepared, drawing.positions)
        self._last.index_copy_(0, drawing.slots, sampled.ids)
        return Ticket(schedule, sampled)

    def probe(self) -> None:
        """Run one token through the model in the padding block; raises what the model raises."""
        request = Request(id="probe", prompt_ids=[0], params=SamplingParams())
        sequence = Running(request, 0, seed=0, max_length=2, root=b"")
        sequence.blocks, sequence.slot = [0], 0
        try:
            self.submit([Row(sequence, start=0, count=1, sample=False)])
        finally:
            self._backend.cache.clear([0])  # others read it as padding

    def clear(self, blocks: list[int]) -> None:
        """Make blocks harmless in which a request has left NaN or infinity."""
        self._backend.cache.clear(blocks)

    def _batch(self, schedule: Schedule) -> tuple[Batch, "_Drawing | None"]:
        """The tensors of a step, and where it draws; all of them cross to the device at once."""
        counts = [row.count for row in schedule]
        lengths = [row.start + row.count for row in schedule]
        slots = [row.sequence.slot for row in schedule]
        for row in schedule:
            self._tables.update(row.sequence.slot, row.sequence.blocks)
        ends = list(accumulate(counts))
        if ends[-1] == len(schedule):  # every sequence decodes
            of_row = np.array(slots)
            positions = np.array(lengths) - 1
        else:
            # Position of every row: its place in the step, shifted to where its sequence stands.
            shifts = [row.start + row.count - end for row, end in zip(schedule, ends, strict=True)]
            of_row = np.repeat(slots, counts)
            positions = np.arange(ends[-1]) + np.repeat(shifts, counts)
        pages, offsets = np.divmod(positions, self._size)
        blocks = self._tables.rows[of_row, pages]
        tables = self._tables.rows[slots, : -(-max(lengths) // self._size)]
        drawing = [i for i, row in enumerate(schedule) if row.sample]
        ids, unknown = _ids(schedule)
        packed = self._pack(
            ids, positions, blocks * self._size + offsets, tables.ravel(), [0, *ends], lengths,
            [ends[i] - 1 for i in drawing], [lengths[i] for i in drawing],
            [slots[i] for i in drawing], [place for place, _ in unknown],
            [slot for _, slot in unknown],
        )  # fmt: skip
        if unknown:
            packed[0][packed[9]] = self._last[packed[10]]
        batch = Batch(
            ids=packed[0],
            positions=packed[1],
            slot_mapping=packed[2],
            block_tables=packed[3].view(tables.shape),
            cu_seqlens=packed[4],
            context_lens=packed[5],
            last_rows=packed[6],
            query_lens_host=counts,
            context_lens_host=lengths,
            block_size=self._size,
            backend=self._backend,
        )
        sequences = [schedule[i].sequence for i in drawing]
        return batch, _Drawing(sequences, packed[7], packed[8]) if drawing else None

    def _pack(self, *columns: "np.ndarray | list[int]") -> Sequence[torch.Tensor]:
        """One int64 tensor per column, all of them views of one."""
        sizes = [len(column) for column in columns]
        whole = torch.from_numpy(np.concatenate(columns, dtype=np.int64, casting="unsafe"))
        return torch.split_with_sizes(whole.to(self._device, non_blocking=True), sizes)

    def _prepare(self, sequences: list[Running]) -> Prepared:
        old = self._prepared
        if old is None or old.needs_history or sequences != self._prepared_for:
            self._prepared = self._sampler.prepare([self._sample_row(s) for s in sequences])
            self._prepared_for = sequences
        return cast(Prepared, self._prepared)

    def _sample_row(self, sequence: Running) -> SampleRow:
        history = (
            sequence.tokens[sequence.prompt_len :] if sequence.request.params.needs_history else []
        )
        return SampleRow(
            params=sequence.request.params,
            seed=sequence.seed,
            choice=sequence.index,
            prompt_ids=sequence.request.prompt_ids,
            output_ids=history,
            eos_ids=self._eos,
        )


def _ids(schedule: Schedule) -> tuple[list[int], list[tuple[int, int]]]:
    """Input ids, and (row, slot) of those that only the device knows yet: last tokens."""
    ids: list[int] = []
    unknown: list[tuple[int, int]] = []
    for row in schedule:
        known = row.sequence.tokens[row.start : row.start + row.count]
        ids += known
        if len(known) < row.count:
            unknown.append((len(ids), row.sequence.slot))
            ids.append(0)
    return ids, unknown
