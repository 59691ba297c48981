"""Scheduler: owns waiting and running sequences; decides a step, and what its tokens mean."""

from collections import deque
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from kvrun.runtime.cache.blocks import BlockPool
from kvrun.runtime.cache.prefix import PrefixCache
from kvrun.runtime.cache.sources import SourceCache
from kvrun.runtime.engine.admission import first_ready, known_prefix, known_sources
from kvrun.runtime.engine.request import Delta, Logprob, Stats
from kvrun.runtime.engine.sequence import Sequence, State
from kvrun.runtime.lora.bank import LoraBank


@dataclass(slots=True)
class Row:
    """`count` tokens of a sequence from position `start`; `sample` when they are its last.

    With `turns` above 1 the drawn token is fed and another one drawn, so many times in all.
    """

    sequence: Sequence
    start: int
    count: int
    sample: bool
    turns: int = 1

    @property
    def reads(self) -> int:
        """Rows of sources that are read before this row: with a sequence's first."""
        if not self.sequence.sources or self.start != self.sequence.begun:
            return 0
        return sum(source.rows for source, _ in self.sequence.unread)

    @property
    def pools(self) -> bool:
        """Whether the state of its last token is wanted; it does not sample then."""
        sequence = self.sequence
        return sequence.pooling and self.start + self.count == sequence.prompt_len


class Drawn(NamedTuple):
    """What a landed step says of one row: a token for each turn, if it samples.

    Where logits were not finite, `finite` is false and the tokens end before. `prompt` are
    log-probabilities of the prompt's tokens behind those of the row.
    """

    token_ids: list[int]
    finite: bool = True
    logprob: Logprob | None = None  # of the only turn
    prompt: Rows[Logprob] = ()
    state: bytes | None = None  # of a row that pools


Schedule = list[Row]
# Sequences from which on a step costs the host enough to take several turns at once.
MANY = 12
# Tokens of a step below which running out of memory is not the step's size.
MIN_BUDGET = 64
NOT_FINITE = "the model's output is not finite (NaN or infinity)"


class Scheduler:
    """First come first served, decode first; chunked prefill shares the step's token budget.

    Blocks are taken when a token needs them. When none is left the youngest running sequence is
    preempted: it loses its blocks and is computed again later. Steps may be scheduled ahead of
    what has landed; blocks that an open ticket names are not given to anybody else.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix: PrefixCache | None,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        turns: int = 1,
        many: int = MANY,
        shares: bool = True,
        eos_ids: frozenset[int] = frozenset(),
        bank: LoraBank | None = None,
        sources: SourceCache | None = None,
    ) -> None:
        self.pool = pool
        self._bank = bank
        self.prefix = prefix
        self._sources = sources
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.leaving: list[Sequence] = []  # finished, but named by an open ticket
        self._size = block_size
        self._budget = max_num_batched_tokens
        self._max_seqs = max_num_seqs
        self._turns, self._many, self._shares = turns, many, shares
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self._stuck: tuple[Sequence, int] | None = None  # who could not start with so few free
        self._eos = eos_ids
        self._spoilt: list[int] = []
        self._deltas: list[Delta] = []  # made outside `commit`, sent with the next step
        self.stats = Stats(blocks_total=pool.total)

    # -- requests come and go ---------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request (or one of its choices) in any state; each choice gets a last delta."""
        for sequence in [*self.running, *self.waiting]:
            if sequence.request.id == request_id and index in (None, sequence.index):
                self._emit(sequence, [], None, "abort")
                self._leave(sequence)

    def fail(self, sequence: Sequence, why: str) -> None:
        """End one sequence with an error; what it computed is never offered to others."""
        if sequence.state is State.FINISHED:
            return
        for cache in (self.prefix, self._sources):
            if cache:
                cache.forget(sequence.own_blocks)
        sequence.failed = True
        self._emit(sequence, [], None, "error", why)
        self._leave(sequence)

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running or self.leaving or self._deltas)

    def take_deltas(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def take_spoilt(self) -> list[int]:
        """Free blocks that may hold NaN, which would spoil whoever gets them next."""
        spoilt, self._spoilt = self._spoilt, []
        return spoilt

    # -- one step ---------------------------------------------------------------------------

    def schedule(self) -> Schedule:
        """The next step: decode rows, then chunks of running prompts, then new sequences."""
        budget = self._budget
        rows: Schedule = []
        prompts: list[Sequence] = []
        for sequence in list(self.running):
            remaining = sequence.remaining
            if remaining > 1 or (remaining and sequence.pooling):
                prompts.append(sequence)
            elif remaining and budget > 0 and self._may_run(sequence) and self._grow(sequence):
                rows.append(Row(sequence, sequence.scheduled, 1, True))
                budget -= 1 + rows[-1].reads
        decodes = len(rows)
        for sequence in prompts:
            if budget > 0 and self._may_run(sequence):
                count = min(budget, sequence.chunk)
                rows.append(self._row(sequence, count))
                budget -= count + rows[-1].reads
        while budget > 0 and (admitted := self._admit()):
            count = min(budget, admitted.chunk)
            rows.append(self._row(admitted, count))
            budget -= count + rows[-1].reads
        if self._turns > 1 and decodes == len(rows) >= self._many and self._reserve(rows):
            for row in rows:
                row.turns = self._turns
        for row in rows:
            sequence, turns = row.sequence, row.turns
            sequence.scheduled += row.count + turns - 1
            sequence.in_flight += turns if row.sample else 0
            sequence.open_tickets += 1
        self.stats.steps += rows[0].turns if rows else 0
        return rows

    def _reserve(self, rows: Schedule) -> bool:
        """Whether all rows may take several turns unseen; then they have the blocks for them.

        A sequence that ends on the way goes on for nothing: what it draws is dropped, and what it
        would write beyond its end goes nowhere.
        """
        missing: list[tuple[Sequence, int]] = []
        for row in rows:
            sequence = row.sequence
            if not sequence.plain:
                return False
            stop = min(row.start + self._turns, sequence.max_length - 1)
            blocks = -(-stop // self._size) - len(sequence.blocks)
            if blocks > 0:
                missing.append((sequence, blocks))
        if sum(blocks for _, blocks in missing) > self.pool.free:
            return False
        for sequence, blocks in missing:
            sequence.blocks += self.pool.take(blocks)
        return True

    def commit(self, schedule: Schedule, drawn: Rows[Drawn | None]) -> list[Delta]:
        """Take in what a step has drawn; `drawn[i]` belongs to row i (None: nothing sampled)."""
        for row, draw in zip(schedule, drawn, strict=True):
            sequence = row.sequence
            sequence.open_tickets -= 1
            if row.start < sequence.prompt_len:
                computed = min(row.start + row.count, sequence.prompt_len) - row.start
                self.stats.prompt_tokens += (sequence.encoded and row.reads) or computed
            if draw is not None and draw.prompt:
                # What was computed before a preemption is known already.
                known = len(sequence.prompt_logprobs) - row.start
                sequence.prompt_logprobs += draw.prompt[known:]
            if draw is not None and row.sample:
                sequence.in_flight -= row.turns
                if sequence.state is not State.FINISHED:
                    self._accept(sequence, draw)
            if draw is not None and row.pools and sequence.state is not State.FINISHED:
                self._pool(sequence, draw)
            if sequence.draining:
                self._settle(sequence)
        return self.take_deltas()

    def undo(self, row: Row) -> None:
        """Take back a row whose step raised, so that it can be scheduled again."""
        sequence = row.sequence
        sequence.scheduled -= row.count + row.turns - 1
        sequence.in_flight -= row.turns if row.sample else 0
        sequence.open_tickets -= 1
        self._settle(sequence)

    def shrink(self) -> bool:
        """A step did not fit into memory: smaller ones from now on, with fewer sequences.

        False when they cannot be smaller.
        """
        smaller = max(self._budget // 2, min(self._budget, MIN_BUDGET))
        youngest = next((s for s in reversed(self.running) if not s.draining), None)
        if smaller == self._budget and (youngest is None or len(self.running) == 1):
            return False
        self._budget = smaller
        if youngest is not None and len(self.running) > 1:
            self._preempt(youngest)
        return True

    # -- tokens -----------------------------------------------------------------------------

    def _accept(self, sequence: Sequence, draw: Drawn) -> None:
        reason, token_ids = sequence.until_end(draw.token_ids, self._eos)
        if token_ids:
            sequence.tokens += token_ids
            self.stats.generated_tokens += len(token_ids)
            self._register(sequence)
            self._emit(sequence, token_ids, draw.logprob, reason)
        if reason:
            self._leave(sequence)
        elif not draw.finite:
            self.fail(sequence, NOT_FINITE)

    def _pool(self, sequence: Sequence, draw: Drawn) -> None:
        if not draw.finite:
            self.fail(sequence, NOT_FINITE)
            return
        self._register(sequence)
        self._emit(sequence, [], None, "stop", state=draw.state)
        self._leave(sequence)

    def _register(self, sequence: Sequence) -> None:
        """Offer sources and full blocks to others: only now, when a finite draw has vouched."""
        if self._sources:
            for source, blocks in sequence.unread:
                self._sources.register(*sequence.source_key(source), blocks)
        if not (prefix := self.prefix):
            return
        computed = len(sequence.tokens) - 1
        for index in range(len(sequence.keys) - 1, computed // self._size):
            chunk = sequence.named(index * self._size, (index + 1) * self._size)
            parent = sequence.keys[-1]
            sequence.keys.append(prefix.register(parent, chunk, sequence.blocks[index]))

    def _emit(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprob: Logprob | None,
        reason: str | None,
        error: str | None = None,
        state: bytes | None = None,
    ) -> None:
        first = sequence.generated == len(token_ids)
        self._deltas.append(
            Delta(
                request_id=sequence.request.id,
                index=sequence.index,
                token_ids=token_ids,
                logprobs=[logprob] if logprob else None,
                prompt_logprobs=sequence.told_logprobs if first else None,
                finish_reason=reason,
                error=error,
                cached_tokens=(sequence.hit_tokens or 0) if first else 0,
                state=state,
            )
        )

    # -- blocks and slots -------------------------------------------------------------------

    def _row(self, sequence: Sequence, count: int) -> Row:
        sample = count == sequence.remaining and not sequence.pooling
        return Row(sequence, sequence.scheduled, count, sample)

    def _may_run(self, sequence: Sequence) -> bool:
        if sequence.state is not State.RUNNING or sequence.draining:
            return False
        return not (sequence.in_flight and sequence.request.params.needs_history)

    def _grow(self, sequence: Sequence) -> bool:
        """Make sure the next position has a block; preempt younger sequences if need be."""
        while len(sequence.blocks) * self._size <= sequence.scheduled:
            if self.pool.free:
                sequence.blocks += self.pool.take(1)
                continue
            if self.leaving or any(s.draining for s in self.running):
                return False  # blocks are on their way
            victim = next(s for s in reversed(self.running) if not s.draining)
            self._preempt(victim)
            if victim is sequence or not self.pool.free:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.stats.preemptions += 1
        sequence.draining = True
        self._settle(sequence)

    def _admit(self) -> Sequence | None:
        """The first waiting sequence, if it can start now."""
        if len(self.running) + len(self.leaving) >= self._max_seqs:
            return None
        sequence, broken = first_ready(self.waiting, self._bank, self.prefix)
        for unservable, why in broken:
            self.fail(unservable, why)
        if sequence is None:
            return None
        if self._stuck is not None and self._stuck == (sequence, self.pool.free):
            return None  # looking up a long prefix in vain, step after step, would cost
        blocks, keys = known_prefix(sequence, self.prefix, self._size) if self._shares else ([], [])
        known, unread = known_sources(sequence, self._sources, self._size)
        missing = -(-sequence.length // self._size) - len(blocks)
        found = [*blocks, *chain(*known)]
        dormant = sum(self.pool.owners(block) == 0 for block in found)
        # One block in a hundred stays free, so that what runs does not preempt at once.
        spare = self.pool.total // 100 if self.running else 0
        if missing + sum(unread) + dormant + spare > self.pool.free:
            self._stuck = (sequence, self.pool.free)
            return None
        self.waiting.remove(sequence)
        self.pool.share(found)
        taken = [hit or self.pool.take(count) for hit, count in zip(known, unread, strict=True)]
        sequence.place(blocks, keys, self.pool.take(missing), self._size)
        sequence.source_blocks, sequence.source_hits = taken, [bool(hit) for hit in known]
        if sequence.hit_tokens is None:
            sequence.hit_tokens = sequence.found
            self.stats.prefix_hit_tokens += sequence.hit_tokens
        sequence.slot = self._slots.pop()
        sequence.state = State.RUNNING
        self.running.append(sequence)
        return sequence

    def _let_go(self, sequence: Sequence) -> None:
        """A sequence that has ended, and is in no open ticket, needs its adapter no more."""
        if self._bank and sequence.adapter:
            self._bank.release(sequence.adapter, sequence.pinned)

    def _leave(self, sequence: Sequence) -> None:
        if sequence.state is State.WAITING:
            self.waiting.remove(sequence)
            sequence.state = State.FINISHED
            self._let_go(sequence)
            return
        self.running.remove(sequence)
        self.leaving.append(sequence)
        sequence.state = State.FINISHED
        sequence.draining = True
        self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Once no open ticket names a draining sequence, its blocks and its slot are free."""
        if not sequence.draining or sequence.open_tickets:
            return
        self.pool.release(sequence.all_blocks)
        if sequence.failed:
            self._spoilt += [b for b in sequence.own_blocks if not self.pool.owners(b)]
        self._slots.append(sequence.slot)
        sequence.restart()
        if sequence.state is State.FINISHED:
            self.leaving.remove(sequence)
            self._let_go(sequence)
        else:
            self.running.remove(sequence)
            self.waiting.appendleft(sequence)
            sequence.state = State.WAITING
