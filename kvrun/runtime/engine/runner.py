"""ModelRunner: one rank's model, caches and sampler; turns a schedule into a submitted step."""

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch.nn.functional import normalize

from kvrun.runtime.attention import Backend
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.states import StateCache
from kvrun.runtime.device import kernel
from kvrun.runtime.engine.faults import of_device
from kvrun.runtime.engine.features import Features, shows
from kvrun.runtime.engine.graphs import Capture, Graphs
from kvrun.runtime.engine.mixed import Columns, MixedGraphs
from kvrun.runtime.engine.reader import reader
from kvrun.runtime.engine.request import Request
from kvrun.runtime.engine.scheduler import Row, Schedule
from kvrun.runtime.engine.sequence import Sequence as Running
from kvrun.runtime.engine.slots import Slots
from kvrun.runtime.engine.threads import Threads
from kvrun.runtime.engine.ticket import Ticket
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.lora.bank import LoraBank
from kvrun.runtime.lora.rows import Assigned, Rows, assigned, rows_of
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.sampling.sampler import Prepared, Sampled, Sampler, SampleRow

_NOTHING = torch.empty(0, dtype=torch.int64)


class _Drawing(NamedTuple):
    """The sequences of a step that draw a token, its place in each, and their slots."""

    sequences: list[Running]
    positions: torch.Tensor  # [S]
    slots: torch.Tensor  # [S]


class _Scoring(NamedTuple):
    """Which logits of a step tell how likely which tokens of prompts were; which ones draw."""

    rows: torch.Tensor  # [R] of the step's logits
    ids: torch.Tensor  # [R]
    drawn: torch.Tensor  # [S] of the step's logits


class ModelRunner:
    """Fills a Batch from a schedule, runs the model, samples; nothing is read back here.

    Sampled ids stay on the device in the state of `slots`, where the next step finds the input of
    a sequence whose last token the host does not know yet. Once `graphs` are there, a step that
    gives one token to each of its sequences is replayed. `states` are those of recurrent layers.
    """

    def __init__(
        self,
        model: Decoder,
        backend: Backend,
        sampler: Sampler,
        slots: Slots,
        *,
        device: torch.device,
        block_size: int,
        eos_ids: tuple[int, ...],
        threads: Threads | None = None,
        bank: LoraBank | None = None,
        states: StateCache | None = None,
        features: Features | None = None,
    ) -> None:
        self.graphs: Graphs | None = None
        self.mixed: MixedGraphs | None = None
        self._model = model
        self._backend = backend
        self._sampler = sampler
        self._slots = slots
        self._device = device
        self._size = block_size
        self._eos = eos_ids
        self._threads = threads  # None: as many as there are
        self._draw = kernel("draw", device) if device.type == "cuda" else None
        self._bank = bank
        self._states = states
        self._features = features
        self._reader = reader(model, backend, slots, bank, block_size, features)
        self._rows: Rows | None = None
        self._rows_for: list[int] = []
        self._prepared: Prepared | None = None
        self._prepared_for: list[Running] = []

    @torch.inference_mode()
    def capture(self, most: int, dtype: torch.dtype, capture: Capture) -> None:
        """Make steps of up to `most` sequences with one token each replayable, and small others."""
        options: Any = {
            "block_size": self._size, "dtype": dtype, "device": self._device, "capture": capture,
            "resident": cast(LoraBank, self._bank).resident,
        }  # fmt: skip
        parts = self._model, self._backend, self._slots
        self.graphs = Graphs(*parts, most=most, states=self._states, **options)
        if self._states is None:  # else the host must know how long each sequence's part is
            self.mixed = MixedGraphs(*parts, **options)

    def submit(self, schedule: Schedule) -> Ticket:
        """Queue one step. When it has raised, the same rows may be submitted again: they write the
        same cache slots, and states are moved on only by a step that has gone well.

        Raises MemoryError where the device has no room for it.
        """
        if self._threads is None:
            return self._submit(schedule)
        with self._threads(sum(row.count + row.reads for row in schedule)):
            return self._submit(schedule)

    @torch.inference_mode()
    def _submit(self, schedule: Schedule) -> Ticket:
        for row in schedule:
            self._slots.note(row.sequence)
        self._slots.upload()
        try:
            with of_device():
                if self._reader:
                    self._reader.read(schedule)
                turns = schedule[0].turns
                if self._replayable(schedule):
                    found: list[Sampled | None] = [self._replay(schedule) for _ in range(turns)]
                else:
                    found = [self._run(_turn(schedule, turn)) for turn in range(turns)]
                ticket = Ticket.of(schedule, _together(found))
                if self._states is not None:
                    slots = [row.sequence.slot for row in schedule]
                    self._states.commit(self._slots.send(slots)[0])
                return ticket
        except MemoryError:
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            raise

    def _replayable(self, schedule: Schedule) -> bool:
        """Whether all get one token, each behind the one that the device has drawn for it."""
        if not self.graphs or not self.graphs.takes(len(schedule)) or _apart(schedule):
            return False
        fed = self._slots.fed
        return all(
            row.count == 1
            and row.sample
            and fed[row.sequence.slot] == row.start + 1
            and not row.sequence.sources
            for row in schedule
        )

    def _replay(self, schedule: Schedule) -> Sampled:
        graphs = cast(Graphs, self.graphs)
        slots = [row.sequence.slot for row in schedule]
        graphs.replay(slots, _assigned(schedule))
        self._slots.fed[slots] += 1
        return self._drawn(graphs, [row.sequence for row in schedule], slots)

    def _drawn(
        self, graphs: Graphs | MixedGraphs, sequences: list[Running], slots: list[int]
    ) -> Sampled:
        """What a replay has drawn for `sequences`, its first rows, which lie in `slots`."""
        count = len(sequences)
        if all(sequence.plain for sequence in sequences):
            # The next replay writes to the same tensors.
            return Sampled(graphs.ids[:count].clone(), graphs.finite[:count].clone(), None)
        # The graph has drawn by temperature alone; what it appended is put right before it is fed.
        prepared, positions = self._prepare(sequences), graphs.drawn_at[:count].long()
        logits = self._model.capped(graphs.logits[:count]).float()
        sampled = self._sampler.sample(logits, prepared, positions)
        self._slots.state.last.index_copy_(0, self._slots.send(slots)[0], sampled.ids)
        return sampled

    def _run(self, schedule: Schedule) -> Sampled | None:
        for row in schedule:
            self._slots.fed[row.sequence.slot] = -1
        columns = self._columns(schedule)
        sequences = [row.sequence for row in schedule if row.sample]
        taken = self.mixed is not None and self.mixed.takes(len(columns.ids), len(schedule))
        other = columns.targets or shows(schedule) or any(row.pools for row in schedule)
        if taken and not (other or _apart(schedule)):
            mixed = cast(MixedGraphs, self.mixed)
            mixed.replay(columns, _assigned(schedule))
            sampled = self._drawn(mixed, sequences, columns.drawing) if sequences else None
        else:
            sampled = self._launch(columns, sequences, schedule)
        if self.graphs is not None:
            for row in schedule:
                if row.sample:
                    self._slots.fed[row.sequence.slot] = row.start + row.count + 1
        return sampled

    def _launch(
        self, columns: Columns, sequences: list[Running], schedule: Schedule
    ) -> Sampled | None:
        """A step of any size, kernel by kernel."""
        batch, drawing, scoring = self._batch(columns, sequences)
        batch.lora = self._adapters(schedule)
        if self._features is not None:
            self._features.put(schedule, batch, self._slots.send)
        if pooled := [e - 1 for e, r in zip(columns.ends[1:], schedule, strict=True) if r.pools]:
            batch.state_rows = self._slots.send(pooled)[0]
        if self._reader:
            self._reader.show(schedule, batch)
        self._backend.plan(batch)
        logits = self._model(batch)
        states = None if batch.states is None else normalize(batch.states.float(), dim=-1)
        prompt = None
        if scoring is not None:
            scored = self._model.capped(logits.index_select(0, scoring.rows))
            prompt = self._sampler.score(scored, scoring.ids, _most(schedule))
            logits = logits.index_select(0, scoring.drawn)
        if drawing is None:
            nothing = prompt is None and states is None
            return None if nothing else Sampled(_NOTHING, _NOTHING, None, prompt, states)
        sampled = replace(self._sample(logits, drawing), prompt=prompt, states=states)
        state = self._slots.state
        state.last.index_copy_(0, drawing.slots, sampled.ids)
        if self.graphs is not None:
            state.lengths.index_copy_(0, drawing.slots, drawing.positions.int() + 1)
        return sampled

    def _sample(self, logits: torch.Tensor, drawing: _Drawing) -> Sampled:
        if self._draw is not None and all(s.plain for s in drawing.sequences):
            state = self._slots.state
            temperature = state.temperature.index_select(0, drawing.slots)
            noise = state.keys.index_select(0, drawing.slots)
            cap = self._model.softcap
            ids, finite = self._draw.draw(logits, temperature, noise, drawing.positions, cap=cap)
            return Sampled(ids, finite, None)
        prepared = self._prepare(drawing.sequences)
        logits = self._model.capped(logits).float()
        return self._sampler.sample(logits, prepared, drawing.positions)

    def probe(self) -> None:
        """Run one token through the model in the padding block; raises what the model raises."""
        request = Request(id="probe", prompt_ids=[0], params=SamplingParams())
        sequence = Running(request, 0, seed=0, max_length=2, root=b"")
        sequence.blocks, sequence.slot = [0], self._slots.padding
        try:
            self.submit([Row(sequence, start=0, count=1, sample=False)])
        finally:
            self._backend.cache.clear([0])  # others read it as padding

    def clear(self, blocks: list[int]) -> None:
        """Make blocks harmless in which a request has left NaN or infinity."""
        self._backend.cache.clear(blocks)

    def _columns(self, schedule: Schedule) -> Columns:
        counts = [row.count for row in schedule]
        lengths = [row.start + row.count for row in schedule]
        slots = [row.sequence.slot for row in schedule]
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
        places = self._slots.tables[of_row, pages].astype(np.int64) * self._size + offsets
        drawing = [i for i, row in enumerate(schedule) if row.sample]
        ids, unknown = _ids(schedule)
        wanted, *scored = _wanted(schedule, ends)
        return Columns(
            ids, positions, places, slots, [0, *ends], lengths,
            wanted, [lengths[i] for i in drawing],
            [slots[i] for i in drawing], [place for place, _ in unknown],
            [slot for _, slot in unknown], *(scored or ([], [], [])),
        )  # fmt: skip

    def _adapters(self, schedule: Schedule) -> Rows | None:
        """Which rows of a step use which adapters; the same object while nothing changes."""
        adapters = _assigned(schedule)
        if self._bank is None or adapters is None:
            return None
        counts = [row.count for row in schedule]
        key = [*counts, *adapters.placements]
        if self._rows is None or key != self._rows_for:
            of_row = np.repeat(adapters.slots, counts)
            self._rows = rows_of(self._bank.resident, of_row, self._slots.send)
            self._rows_for = key
        return self._rows

    def _batch(
        self, columns: Columns, sequences: list[Running]
    ) -> tuple[Batch, "_Drawing | None", "_Scoring | None"]:
        """The tensors of a step, and where it draws; all of them cross to the device at once."""
        sent: Any = Columns(*self._slots.send(*columns))  # type: ignore[arg-type]
        state = self._slots.state
        if columns.unknown:
            sent.ids[sent.unknown] = state.last[sent.unknown_slots]
        used = -(-max(columns.lengths) // self._size)
        batch = Batch(
            ids=sent.ids,
            positions=sent.positions,
            slot_mapping=sent.places,
            block_tables=state.tables.index_select(0, sent.slots)[:, :used],
            cu_seqlens=sent.ends,
            context_lens=sent.lengths,
            last_rows=sent.last_rows,
            query_lens_host=[b - a for a, b in pairwise(columns.ends)],
            context_lens_host=columns.lengths,
            block_size=self._size,
            backend=self._backend,
        )
        if self._states is not None:
            batch.recurrent = self._states.rows(sent.slots, sent.ends, sent.lengths)
        drawing = _Drawing(sequences, sent.drawn_at, sent.drawing) if sequences else None
        scoring = _Scoring(sent.scoring, sent.targets, sent.drawn_rows) if columns.targets else None
        return batch, drawing, scoring

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
            prompt_ids=sequence.tokens[: sequence.prompt_len],
            output_ids=history,
            eos_ids=self._eos,
        )


def _turn(schedule: Schedule, turn: int) -> Schedule:
    """A turn of a step as a step of its own."""
    return [replace(row, start=row.start + turn) for row in schedule] if turn else schedule


def _together(turns: list[Sampled | None]) -> Sampled | None:
    """What all turns have drawn, [turns, S]."""
    found = [turn for turn in turns if turn is not None]
    if len(found) < 2:
        return found[0] if found else None
    ids, finite = (torch.stack([getattr(t, name) for t in found]) for name in ("ids", "finite"))
    return Sampled(ids, finite, None)


def _wanted(schedule: Schedule, ends: list[int]) -> list[list[int]]:
    """The rows of a step whose logits are wanted, in order.

    Where prompts are scored, also: which of these logits score, which tokens, and which draw.
    """
    if not any(row.sequence.scored(row.start, row.count) for row in schedule):
        return [[end - 1 for row, end in zip(schedule, ends, strict=True) if row.sample]]
    wanted: list[int] = []
    scoring: list[int] = []
    targets: list[int] = []
    drawing: list[int] = []
    for row, end in zip(schedule, ends, strict=True):
        scored = row.sequence.scored(row.start, row.count)
        scoring += range(len(wanted), len(wanted) + scored)
        wanted += range(end - row.count, end - row.count + scored)
        targets += row.sequence.tokens[row.start + 1 : row.start + 1 + scored]
        if row.sample:
            drawing.append(len(wanted))
            wanted.append(end - 1)
    return [wanted, scoring, targets, drawing]


def _assigned(schedule: Schedule) -> Assigned | None:
    return assigned([row.sequence.adapter for row in schedule])


def _apart(schedule: Schedule) -> bool:
    """Whether an adapter of the step changes what captured steps do not ask about."""
    found = [row.sequence.adapter for row in schedule]
    return any(a is not None and a.source.layout.apart for a in found)


def _most(schedule: Schedule) -> int:
    """How many tokens beside each scored one."""
    return max(row.sequence.request.params.prompt_logprobs or 0 for row in schedule)


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
