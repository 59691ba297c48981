"""A runner without a model: its cache holds token ids, and the next token is a hash of what a
sequence finds in its pages. A wrong page, position or id changes the tokens."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

from kvrun.runtime.cache.blocks import BlockPool
from kvrun.runtime.cache.prefix import PrefixCache
from kvrun.runtime.engine.engine import Engine, Limits
from kvrun.runtime.engine.request import Delta, Ready, Request
from kvrun.runtime.engine.scheduler import Drawn, Row, Schedule, Scheduler
from kvrun.runtime.sampling.params import SamplingParams

VOCAB = 50
EOS = 7


def next_token(context: list[int], choice: int) -> int:
    return crc32(bytes(context) + bytes([choice])) % VOCAB


def reference(prompt: list[int], params: SamplingParams, index: int = 0) -> list[int]:
    """What a request answers alone, with no cache and no batch."""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < (params.max_tokens or 0):
        tokens.append(next_token(tokens, index))
        if tokens[-1] == EOS and not params.ignore_eos:
            break
    return tokens[len(prompt) :]


@dataclass
class ScriptedTicket:
    schedule: Schedule
    drawn: list[Drawn | None]

    def read(self) -> list[Drawn | None]:
        return self.drawn


@dataclass
class ScriptedRunner:
    block_size: int
    slots: dict[int, int] = field(default_factory=dict)  # cache slot -> token id
    last: dict[int, int] = field(default_factory=dict)  # sequence slot -> sampled id
    poison: Callable[[Row], None] = lambda row: None
    room: int = 10**9  # tokens of the largest step that fits into memory
    not_finite: Callable[[Row], bool] = lambda row: False
    cleared: list[int] = field(default_factory=list)
    submitted: int = 0
    max_rows: int = 0
    chunks: int = 0

    def submit(self, schedule: Schedule) -> ScriptedTicket:
        self.submitted += 1
        if sum(row.count for row in schedule) > self.room:
            raise MemoryError("out of memory")
        for row in schedule:
            assert row.count > 0, "a row without a token has no logits"
            self.poison(row)
        for row in schedule:
            self._write(row)
        drawn = [self._draw(row) if row.sample else None for row in schedule]
        self.max_rows = max(self.max_rows, len(schedule))
        self.chunks += sum(not row.sample for row in schedule)
        return ScriptedTicket(schedule, drawn)

    def probe(self) -> None:
        pass

    def clear(self, blocks: list[int]) -> None:
        self.cleared += blocks
        for block in blocks:
            for offset in range(self.block_size):
                self.slots.pop(block * self.block_size + offset, None)

    def _place(self, row: Row, position: int) -> int:
        block = row.sequence.blocks[position // self.block_size]
        assert block != 0
        return block * self.block_size + position % self.block_size

    def _write(self, row: Row) -> None:
        for position in range(row.start, row.start + row.count):
            known = row.sequence.tokens
            token = known[position] if position < len(known) else self.last[row.sequence.slot]
            self.slots[self._place(row, position)] = token

    def _draw(self, row: Row) -> Drawn:
        length = row.start + row.count
        context = [self.slots[self._place(row, position)] for position in range(length)]
        token = next_token(context, row.sequence.index)
        self.last[row.sequence.slot] = token
        return Drawn(token, finite=not self.not_finite(row))


def scripted_engine(
    *,
    blocks: int = 64,
    block_size: int = 4,
    max_num_seqs: int = 16,
    max_num_batched_tokens: int = 16,
    prefix_caching: bool = True,
    run_ahead: int = 0,
) -> tuple[Engine, ScriptedRunner]:
    pool = BlockPool(blocks + 1)
    scheduler = Scheduler(
        pool,
        PrefixCache(pool, block_size) if prefix_caching else None,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        eos_ids=frozenset([EOS]),
    )
    runner = ScriptedRunner(block_size)
    limits = Limits(vocab_size=VOCAB, max_model_len=blocks * block_size)
    ready = Ready(
        plan="", max_model_len=limits.max_model_len, vocab_size=VOCAB, kv_tokens=0,
        block_size=block_size, device="none", dtype="none", attention="none", load_seconds=0,
    )  # fmt: skip
    return Engine(scheduler, runner, limits, ready=ready, run_ahead=run_ahead), runner


def check_pages(engine: Engine) -> None:
    """Every block is free, or has exactly the owners whose tables name it: leak = 0."""
    scheduler = engine.scheduler
    owners: dict[int, int] = {}
    for sequence in [*scheduler.running, *scheduler.leaving, *scheduler.waiting]:
        for block in sequence.blocks:
            owners[block] = owners.get(block, 0) + 1
    pool = scheduler.pool
    for block in range(1, pool.total + 1):
        assert pool.owners(block) == owners.get(block, 0), f"block {block}"
    assert pool.free + len(owners) == pool.total


def ask(number: int, prompt: list[int], max_tokens: int = 8, **params: object) -> Request:
    return Request(
        id=f"r{number}",
        prompt_ids=prompt,
        params=SamplingParams(max_tokens=max_tokens, temperature=0, **params),  # type: ignore[arg-type]
    )


def drain(
    engine: Engine, first: Sequence[Delta] = (), *, limit: int = 5000
) -> dict[tuple[str, int], tuple[list[int], str]]:
    """Step until idle; tokens and finish reason of every choice. Fails if the engine hangs."""
    found: dict[tuple[str, int], tuple[list[int], str]] = {}
    tokens: dict[tuple[str, int], list[int]] = {}
    deltas = first
    for _ in range(limit):
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in found, "a delta after the last one"
            tokens.setdefault(key, []).extend(delta.token_ids)
            if delta.finish_reason:
                found[key] = (tokens[key], delta.finish_reason)
        if engine.idle:
            return found
        deltas = engine.step()
        check_pages(engine)
    raise AssertionError("the engine does not come to rest")


def prompts(seed: int, count: int, low: int = 1, high: int = 20) -> list[list[int]]:
    source = random.Random(seed)
    return [
        [source.randrange(VOCAB) for _ in range(source.randint(low, high))] for _ in range(count)
    ]
