"""On how many CPU threads steps run: whichever has been faster, as long as it is."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from kvrun import LLM, SamplingParams
from kvrun.bench.run import Subject
from kvrun.runtime.engine.threads import KEPT, LARGEST, SHORTEST, SMALLEST, TRIES, Threads

PARAMETERS = 1_000_000
TOKENS = SMALLEST // PARAMETERS


class Machine:
    """A clock, and how long a step takes on so many threads."""

    def __init__(self) -> None:
        self.now = 0.0
        self.seconds = {1: 0.03, 2: 0.02, 4: 0.01}
        self.threads = Threads(None, PARAMETERS, 4, lambda: self.now)

    def run(self, steps: int, tokens: int = TOKENS) -> Counter[int]:
        """How many steps ran on which number of threads."""
        seen: Counter[int] = Counter()
        for _ in range(steps):
            with self.threads(tokens):
                count = torch.get_num_threads()
                seen[count] += 1
                self.now += self.seconds[count]
        return seen


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_count_is_tried_and_the_fastest_stays() -> None:
    machine = Machine()
    machine.seconds = {1: 0.012, 2: 0.011, 4: 0.01}
    assert machine.run(3 * TRIES) == {1: TRIES, 2: TRIES, 4: TRIES}
    assert machine.run(SHORTEST) == {4: SHORTEST}
    machine = Machine()
    machine.seconds = {1: 0.01, 2: 0.012, 4: 0.014}
    machine.run(3 * TRIES)
    assert machine.run(SHORTEST // 2) == {1: SHORTEST // 2}
    assert torch.get_num_threads() == 1


def test_what_is_clearly_slow_is_tried_once_and_fewer_threads_not_at_all() -> None:
    machine = Machine()
    assert machine.run(SHORTEST) == {4: SHORTEST - 1, 2: 1}


def test_what_slows_down_is_left_within_a_few_steps() -> None:
    machine = Machine()
    machine.run(20)
    machine.seconds = {1: 0.03, 2: 0.5, 4: 1.0}  # another program is busy
    seen = machine.run(2 * SHORTEST)
    assert seen[4] <= 2 * KEPT
    assert seen[2] <= 2 * KEPT
    assert machine.run(SHORTEST)[1] >= SHORTEST - 4


def test_what_was_slow_is_tried_again_and_ever_more_rarely() -> None:
    machine = Machine()
    machine.seconds = {1: 0.01, 2: 0.1, 4: 0.1}
    assert machine.run(3 * TRIES) == {4: TRIES, 2: TRIES, 1: TRIES}
    assert machine.run(SHORTEST) == {1: SHORTEST}
    assert machine.run(2) == {2: 1, 4: 1}
    assert machine.run(2 * SHORTEST) == {1: 2 * SHORTEST}
    machine.seconds[4] = 0.001  # the other program has ended
    machine.run(TRIES + 1)
    assert machine.run(SHORTEST // 2) == {4: SHORTEST // 2}


def test_one_slow_step_changes_nothing() -> None:
    machine = Machine()
    machine.run(3 * TRIES)
    machine.seconds[4] = 5.0
    machine.run(1)
    machine.seconds[4] = 0.01
    assert machine.run(10) == {4: 10}


def test_steps_of_other_sizes_are_measured_by_themselves() -> None:
    machine = Machine()
    machine.run(3 * TRIES)
    machine.seconds = {1: 0.01, 2: 0.012, 4: 0.014}
    assert machine.run(3 * TRIES, 4 * TOKENS) == {1: TRIES, 2: TRIES, 4: TRIES}
    assert machine.run(5, 4 * TOKENS) == {1: 5}
    machine.seconds[4] = 0.001
    assert machine.run(5) == {4: 5}


def test_small_and_large_steps_are_not_tried() -> None:
    machine = Machine()
    assert machine.run(5, TOKENS - 1) == {1: 5}
    assert machine.run(5, LARGEST // PARAMETERS + 1) == {4: 5}


def test_as_many_as_were_asked_for() -> None:
    for tokens in (1, TOKENS, LARGEST):
        with Threads(3, PARAMETERS)(tokens):
            assert torch.get_num_threads() == 3


def test_what_a_benchmark_was_told_is_what_the_engine_is_told() -> None:
    def subject(threads: int | None) -> Subject:
        return Subject.of("tiny", None, False, engine=(), threads=threads, roofline=False)

    assert subject(2).options["threads"] == 2
    assert "threads" not in subject(None).options
    with LLM("tiny", device="cpu", threads=3) as llm:
        counts: list[int] = []
        runner = llm._engine._runner
        run = runner._submit
        runner._submit = lambda schedule: (counts.append(torch.get_num_threads()), run(schedule))[1]
        llm.generate("a", SamplingParams(max_tokens=2))
    assert set(counts) == {3}


def test_a_step_that_fails_says_nothing() -> None:
    machine = Machine()
    for _ in range(3):
        with pytest.raises(MemoryError), machine.threads(TOKENS):
            raise MemoryError
    assert torch.get_num_threads() == 1
    assert machine.run(TRIES + 1) == {4: TRIES, 2: 1}
