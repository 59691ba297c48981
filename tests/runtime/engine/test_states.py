"""Row E10: requests come, go, share, are preempted and aborted in any order, with steps in flight.

After every action the pages are counted, and every answer equals the request's answer alone. The
machine asserts at the end of the run that preemptions, prefix hits and chunks really happened.
"""

from collections import Counter

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvrun.runtime.engine.request import Delta, Request
from kvrun.runtime.engine.scheduler import Row
from tests.runtime.engine.scripted import (
    ask,
    check_pages,
    prompts,
    reference,
    scripted_engine,
)

BLOCKS, SIZE = 14, 4
HEADS = prompts(seed=0, count=3, low=12, high=12)
seen: Counter[str] = Counter()


class Requests(RuleBasedStateMachine):
    @initialize(
        run_ahead=st.integers(0, 3), prefix_caching=st.booleans(), turns=st.sampled_from([1, 3])
    )
    def start(self, run_ahead: int, prefix_caching: bool, turns: int) -> None:
        self.engine, self.runner = scripted_engine(
            blocks=BLOCKS,
            block_size=SIZE,
            max_num_seqs=5,
            max_num_batched_tokens=7,
            prefix_caching=prefix_caching,
            run_ahead=run_ahead,
            turns=turns,
        )
        self.runner.poison = self.poison
        self.runner.not_finite = lambda row: row.sequence.request.id == self.spoilt
        self.poisoned: str | None = None
        self.spoilt: str | None = None
        self.aborted: set[str] = set()
        self.requests: dict[str, Request] = {}
        self.answers: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], str] = {}

    def poison(self, row: Row) -> None:
        if row.sequence.request.id == self.poisoned:
            raise ValueError("poisoned")

    @rule(
        head=st.sampled_from(HEADS),
        cut=st.integers(1, 12),
        tail=st.lists(st.integers(0, 49), max_size=6),
        max_tokens=st.integers(1, 16),
        n=st.sampled_from([1, 1, 1, 3]),
    )
    def add(self, head: list[int], cut: int, tail: list[int], max_tokens: int, n: int) -> None:
        request = ask(len(self.requests), [*head[:cut], *tail], max_tokens, n=n)
        self.engine.add(request)
        self.requests[request.id] = request

    @rule(data=st.data(), tail=st.lists(st.integers(0, 49), min_size=1, max_size=4))
    def go_on(self, data: st.DataObject, tail: list[int]) -> None:
        """The next turn of a conversation: an old prompt, its answer so far, and something new."""
        if self.answers:
            name, index = data.draw(st.sampled_from(sorted(self.answers)))
            prompt = [*self.requests[name].prompt_ids, *self.answers[name, index], *tail]
            if len(prompt) + 5 <= BLOCKS * SIZE:
                self.add(prompt, len(prompt), [], 5, 1)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.take(self.engine.step())
            check_pages(self.engine)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        if self.requests:
            victim = data.draw(st.sampled_from(sorted(self.requests)))
            self.aborted.add(victim)
            self.engine.abort(victim)

    @rule(data=st.data())
    def poison_one(self, data: st.DataObject) -> None:
        if self.requests:
            self.poisoned = data.draw(st.sampled_from([None, *sorted(self.requests)]))
            self.aborted |= {self.poisoned} if self.poisoned else set()

    @rule(data=st.data())
    def spoil_one(self, data: st.DataObject) -> None:
        if self.requests:
            self.spoilt = data.draw(st.sampled_from([None, *sorted(self.requests)]))
            self.aborted |= {self.spoilt} if self.spoilt else set()

    @invariant()
    def pages_are_counted(self) -> None:
        check_pages(self.engine)

    def take(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            key = (delta.request_id, delta.index)
            assert key not in self.ends
            self.answers.setdefault(key, []).extend(delta.token_ids)
            if delta.finish_reason:
                self.ends[key] = delta.finish_reason

    def teardown(self) -> None:
        for _ in range(2000):
            if self.engine.idle:
                break
            self.take(self.engine.step())
        assert self.engine.idle
        check_pages(self.engine)
        stats = self.engine.stats()
        assert stats.blocks_active == 0
        for request in self.requests.values():
            for index in range(request.params.n):
                full = reference(list(request.prompt_ids), request.params, index)
                answer, end = self.answers[request.id, index], self.ends[request.id, index]
                if end in {"abort", "error"}:
                    assert request.id in self.aborted
                    assert answer == full[: len(answer)]
                else:
                    assert answer == full
        seen["preemptions"] += stats.preemptions
        seen["hits"] += stats.prefix_hit_tokens
        seen["chunks"] += self.runner.chunks
        seen["failed"] += stats.failed_steps
        seen["spoilt"] += len(self.runner.cleared)


def test_E10_any_order_of_events() -> None:
    seen.clear()
    run_state_machine_as_test(
        Requests,
        settings=settings(
            max_examples=150,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert min(seen[name] for name in ("preemptions", "hits", "chunks", "failed", "spoilt")) > 0, (
        seen
    )
