"""On how many CPU threads steps run: whichever has been faster, as long as it is."""

from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from kvrun.runtime.engine.threads import LARGEST, SHORTEST, SMALLEST, TRIES, Threads

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
    assert machine.run(3 * TRIES) == {1: TRIES, 2: TRIES, 4: TRIES}
    assert machine.run(SHORTEST) == {4: SHORTEST}
    machine = Machine()
    machine.seconds = {1: 0.01, 2: 0.02, 4: 0.01001}
    machine.run(3 * TRIES)
    assert machine.run(SHORTEST) == {1: SHORTEST}
    assert torch.get_num_threads() == 1


def test_what_slows_down_is_left_within_a_few_steps() -> None:
    machine = Machine()
    machine.run(3 * TRIES + 10)
    machine.seconds = {1: 0.03, 2: 0.5, 4: 1.0}  # another program is busy
    seen = machine.run(20)
    assert seen[4] <= 3
    assert seen[2] <= 3
    assert seen[1] >= 14


def test_what_was_slow_is_tried_again_and_ever_more_rarely() -> None:
    machine = Machine()
    machine.seconds = {1: 0.01, 2: 0.1, 4: 0.1}
    machine.run(3 * TRIES)
    assert machine.run(SHORTEST) == {1: SHORTEST}
    assert machine.run(2 * TRIES) == {2: TRIES, 4: TRIES}
    assert machine.run(2 * SHORTEST) == {1: 2 * SHORTEST}
    machine.seconds[4] = 0.001  # the other program has ended
    machine.run(2 * TRIES)
    assert machine.run(SHORTEST) == {4: SHORTEST}


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
    machine.seconds = {1: 0.01, 2: 0.02, 4: 0.03}
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


def test_a_step_that_fails_says_nothing() -> None:
    machine = Machine()
    for _ in range(3):
        with pytest.raises(MemoryError), machine.threads(TOKENS):
            raise MemoryError
    assert torch.get_num_threads() == 1
    assert machine.run(3 * TRIES) == {1: TRIES, 2: TRIES, 4: TRIES}
