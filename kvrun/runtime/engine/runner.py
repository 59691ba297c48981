"""ModelRunner: one rank's model, caches and sampler; turns a schedule into a submitted step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
        start = self.written[slot]
        if start < len(blocks):
            self.rows[slot, start : len(blocks)] = blocks[start:]
            self.written[slot] = len(blocks)


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
    ) -> None:
        self._model = model
        self._backend = backend
        self._sampler = sampler
        self._device = device
        self._size = block_size
        self._eos = eos_ids
        self._last = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._tables = _Tables.empty(max_num_seqs, -(-max_model_len // block_size))
        self._prepared: Prepared | None = None
        self._prepared_for: list[Running] = []

    @torch.inference_mode()
    def submit(self, schedule: Schedule) -> Ticket:
        """Queue one step. Submitting the same rows again writes the same cache slots again."""
        batch = self._batch(schedule)
        self._backend.plan(batch)
        logits = self._model(batch)
        rows = [row for row in schedule if row.sample]
        if not rows:
            return Ticket(schedule, None)
        positions = self._tensor([row.start + row.count for row in rows])
        sampled = self._sampler.sample(logits, self._prepare(rows), positions)
        slots = self._tensor([row.sequence.slot for row in rows])
        self._last.index_copy_(0, slots, sampled.ids)
        return Ticket(schedule, sampled)

    def probe(self) -> None:
        """Run one token through the model in the padding block; raises what the model raises."""
        request = Request(id="probe", prompt_ids=[0], params=SamplingParams())
        sequence = Running(request, 0, seed=0, max_length=2, root=b"")
        sequence.blocks, sequence.slot = [0], 0
        self.submit([Row(sequence, start=0, count=1, sample=False)])

    def _batch(self, schedule: Schedule) -> Batch:
        counts = [row.count for row in schedule]
        lengths = [row.start + row.count for row in schedule]
        slots = [row.sequence.slot for row in schedule]
        for row in schedule:
            self._tables.update(row.sequence.slot, row.sequence.blocks)
        starts = np.array([row.start for row in schedule], np.int64)
        ends = np.cumsum(counts)
        first = ends - counts  # where each sequence's rows begin
        total = int(ends[-1])
        # Position of every row: its place in the step, shifted to where its sequence stands.
        positions = np.arange(total) + np.repeat(starts - first, counts)
        of_row = np.repeat(slots, counts)
        blocks = self._tables.rows[of_row, positions // self._size]
        pages = -(-max(lengths) // self._size)
        return Batch(
            ids=self._ids(schedule, total),
            positions=self._tensor(positions),
            slot_mapping=self._tensor(blocks * self._size + positions % self._size),
            block_tables=self._tensor(self._tables.rows[slots, :pages]),
            cu_seqlens=self._tensor(np.concatenate(([0], ends))),
            context_lens=self._tensor(lengths),
            last_rows=self._tensor(
                [end - 1 for end, r in zip(ends, schedule, strict=True) if r.sample]
            ),
            query_lens_host=counts,
            context_lens_host=lengths,
            block_size=self._size,
            backend=self._backend,
        )

    def _ids(self, schedule: Schedule, total: int) -> torch.Tensor:
        ids: list[int] = []
        unknown: list[tuple[int, int]] = []  # (row of the batch, slot)
        for row in schedule:
            known = row.sequence.tokens[row.start : row.start + row.count]
            if len(known) < row.count:  # only ever the last token: it is still on the device
                unknown.append((len(ids) + row.count - 1, row.sequence.slot))
                known = [*known, 0]
            ids += known
        tensor = self._tensor(ids)
        if unknown:
            places, slots = (self._tensor(list(column)) for column in zip(*unknown, strict=True))
            tensor[places] = self._last[slots]
        return tensor

    def _prepare(self, rows: list[Row]) -> Prepared:
        sequences = [row.sequence for row in rows]
        if (
            self._prepared is None
            or self._prepared.needs_history
            or sequences != self._prepared_for
        ):
            self._prepared = self._sampler.prepare([self._sample_row(s) for s in sequences])
            self._prepared_for = sequences
        return self._prepared

    def _sample_row(self, sequence: Running) -> SampleRow:
        history = sequence.tokens[sequence.prompt_len :] if sequence.needs_host else []
        return SampleRow(
            params=sequence.request.params,
            seed=sequence.seed,
            choice=sequence.index,
            prompt_ids=sequence.request.prompt_ids,
            output_ids=history,
            eos_ids=self._eos,
        )

    def _tensor(self, values: "np.ndarray | list[int]") -> torch.Tensor:
        array = np.asarray(values, np.int64)
        return torch.from_numpy(array).to(self._device, non_blocking=True)
