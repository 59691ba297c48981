"""Matrices of an adapter's file, spread: the twin against torch, the kernel in C against both."""

from types import ModuleType

import numpy as np
import pytest
import torch

from kvrun.runtime.kernels import spread as twin
from kvrun.runtime.kernels.native import spread as native
from kvrun.runtime.kernels.spread import Bits, Matrix, Target, bits

WITHOUT = pytest.mark.skipif(not native.available(), reason="there is no C compiler here")
MODULES = [pytest.param(twin, id="twin"), pytest.param(native, id="native", marks=WITHOUT)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Ranges = tuple[tuple[int, int], ...] | None


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def part_of(*matrices: torch.Tensor) -> Bits:
    """Their bytes, one behind the other."""
    return torch.cat([m.reshape(-1) for m in matrices]).view(torch.uint8).numpy().copy()


def wanted(matrix: torch.Tensor, scale: float, dim: int, ranges: Ranges) -> torch.Tensor:
    wide = (matrix if matrix.dtype == torch.float64 else matrix.float()) * scale
    parts = wide.split(1, dim)
    kept = (
        range(matrix.shape[dim]) if ranges is None else [n for a, b in ranges for n in range(a, b)]
    )
    chosen = torch.cat([parts[n] for n in kept], dim)
    return chosen if dim else chosen.t()


@pytest.mark.parametrize("kernel", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [*DTYPES, torch.float64], ids=str)
def test_matrices_lie_where_they_belong(
    kernel: ModuleType, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """Two matrices of one piece, larger and smaller than a block; targets with room beside them."""
    a, b = torch.randn(3, 1500).to(stored), torch.randn(150, 70).to(stored)
    cuts: list[tuple[torch.Tensor, float, int, Ranges]] = [
        (a, 1.0, 1, None), (a, 1.0, 1, ((7, 20), (0, 5))), (b, 4 / 3, 0, None),
        (b, 4 / 3, 0, ((100, 150), (3, 40))),
    ]  # fmt: skip
    refs = [wanted(*cut).to(dtype) for cut in cuts]
    rooms = [torch.zeros(len(ref), ref.shape[1] + 3, dtype=dtype) for ref in refs]
    targets = [
        Target(bits(room.view(-1)).reshape(room.shape)[:, :-3], dim, ranges)
        for room, (_, _, dim, ranges) in zip(rooms, cuts, strict=True)
    ]
    matrices = [Matrix((3, 1500), 1.0, targets[:2]), Matrix((150, 70), 4 / 3, targets[2:])]
    kernel.spread(part_of(a, b), matrices, stored, dtype)
    for room, ref in zip(rooms, refs, strict=True):
        assert torch.equal(room[:, :-3], ref)
        assert not room[:, -3:].any()


@pytest.mark.parametrize("kernel", MODULES)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(kernel: ModuleType, stored: torch.dtype, wrong: float) -> None:
    """Wherever they are, also where no target takes them: every rank must say the same."""
    matrices = [Matrix((37, 50), 1.0, [Target(np.zeros((37, 10), np.int16), 1, ((40, 50),))])]
    for row, column in ((0, 0), (36, 49), (20, 3)):
        matrix = torch.randn(37, 50).to(stored)
        kernel.spread(part_of(matrix), matrices, stored, torch.bfloat16)
        matrix[row, column] = wrong
        with pytest.raises(OverflowError):
            kernel.spread(part_of(matrix), matrices, stored, torch.bfloat16)


@pytest.mark.parametrize("kernel", MODULES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("value", "scale", "stored", "dtype"), [
    (3.4e38, 1.0, torch.float32, torch.bfloat16), (2e38, 3.0, torch.bfloat16, torch.bfloat16),
    (2e38, 3.0, torch.float32, torch.float32), (7e4, 1.0, torch.float32, torch.float16),
])  # fmt: skip
def test_values_that_become_infinite(
    kernel: ModuleType,
    value: float,
    scale: float,
    stored: torch.dtype,
    dtype: torch.dtype,
    sign: int,
) -> None:
    matrix = torch.ones(4, 5, dtype=stored)
    matrix[2, 3] = sign * value
    place = bits(torch.zeros(20, dtype=dtype)).reshape(5, 4)
    with pytest.raises(OverflowError):
        kernel.spread(part_of(matrix), [Matrix((4, 5), scale, [Target(place, 0)])], stored, dtype)
