"""A decode step's tensors from the state by slot, and the state after it."""

from collections.abc import Iterator
from dataclasses import fields
from types import ModuleType

import pytest
import torch

from kvrun.runtime.kernels import step as twin
from kvrun.runtime.kernels.step import State, Step
from kvrun.runtime.kernels.triton import step as triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOTS, PAGES, SIZE = 7, 150, 4
PADDING = SLOTS - 1


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


@pytest.fixture(params=[twin, triton], ids=["twin", "triton"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def state() -> State:
    tables = torch.randint(1, 1 << 20, (SLOTS, PAGES), dtype=torch.int32)
    tables[PADDING] = 0
    return State(
        last=torch.randint(0, 1000, (SLOTS,)),
        lengths=torch.tensor([1, 4, 5, 599, 600, 77, 123456], dtype=torch.int32),
        tables=tables,
        temperature=torch.rand(SLOTS),
        keys=torch.randint(-(2**31), 2**31, (SLOTS, 2), dtype=torch.int32),
    )


def empty(rows: int) -> Step:
    return Step(
        ids=torch.full((rows,), -1),
        positions=torch.full((rows,), -1),
        context_lens=torch.full((rows,), -1, dtype=torch.int32),
        slot_mapping=torch.full((rows,), -1),
        block_tables=torch.full((rows, PAGES + 10), -1, dtype=torch.int32)[:, :PAGES],
        temperature=torch.full((rows,), -1.0),
        keys=torch.full((rows, 2), -1, dtype=torch.int32),
    )


def slots(*of: int) -> torch.Tensor:
    return torch.tensor(of, dtype=torch.int32)


def copy(of: State) -> State:
    return State(**{f.name: getattr(of, f.name).clone() for f in fields(of)})


def test_prepare(kernel: ModuleType) -> None:
    before, step = state(), empty(8)
    known = copy(before)
    order = [4, 0, PADDING, 3, 1, PADDING, 2, 5]
    kernel.prepare(slots(*order), before, step, SIZE)
    for row, slot in enumerate(order):
        length = 1 if slot == PADDING else int(before.lengths[slot])
        position = length - 1
        block = int(before.tables[slot, position // SIZE])
        used = position // SIZE + 1
        assert step.ids[row] == before.last[slot]
        assert step.positions[row] == position
        assert step.context_lens[row] == length
        assert step.slot_mapping[row] == block * SIZE + position % SIZE
        assert torch.equal(step.block_tables[row, :used], before.tables[slot, :used])
        assert (step.block_tables[row, used:] == -1).all()
        assert step.temperature[row] == before.temperature[slot]
        assert torch.equal(step.keys[row], before.keys[slot])
    assert (step.block_tables._base[:, PAGES:] == -1).all()
    for f in fields(State):
        assert torch.equal(getattr(before, f.name), getattr(known, f.name))


@pytest.mark.parametrize("rows", [3, 200])
def test_advance(kernel: ModuleType, rows: int) -> None:
    after = state()
    before = copy(after)
    order = [5, 2, 0] + [PADDING] * (rows - 3)
    ids = torch.arange(rows) + 5000
    kernel.advance(slots(*order), ids, after)
    last, lengths = before.last.clone(), before.lengths.clone()
    last[[5, 2, 0]] = torch.tensor([5000, 5001, 5002])
    lengths[[5, 2, 0]] += 1
    assert torch.equal(after.last, last)
    assert torch.equal(after.lengths, lengths)


def test_a_step_feeds_what_the_last_one_drew(kernel: ModuleType) -> None:
    of, step, rows = state(), empty(2), slots(1, PADDING)
    for drawn in (11, 12, 13):
        position = int(of.lengths[1]) - 1
        kernel.prepare(rows, of, step, SIZE)
        assert step.positions.tolist() == [position, 0]
        kernel.advance(rows, torch.tensor([drawn, 99]), of)
    kernel.prepare(rows, of, step, SIZE)
    assert step.ids[0] == 13
    assert step.slot_mapping[0] == of.tables[1, 1] * SIZE + 2
