"""The noise is uniform, independent, and the same in any batch."""

import math

import numpy as np
import pytest
import torch

from kvrun.runtime.kernels.noise import Gumbel, keys

CPU = torch.device("cpu")


def rows(*of: tuple[int, int]) -> torch.Tensor:
    return torch.tensor([keys(seed, choice) for seed, choice in of], dtype=torch.int32)


def uniform(noise: torch.Tensor) -> np.ndarray:
    return np.exp(-np.exp(-noise.double().numpy()))


def chi_square(counts: np.ndarray) -> float:
    """Standardised: far above 4 when the counts are not all alike."""
    expected, freedom = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


def joint(a: np.ndarray, b: np.ndarray) -> float:
    cells = (a.ravel() * 8).astype(int) * 8 + (b.ravel() * 8).astype(int)
    return chi_square(np.bincount(cells, minlength=64))


def test_bits_follow_the_definition() -> None:
    """The same steps with Python's integers, modulo 2**32."""
    seed, choice, position, token, mask = 2**40 + 12345, 3, 77, 4000, 0xFFFFFFFF
    first, second = (half & mask for half in keys(seed, choice))
    bits = (token * 0x9E3779B1 ^ position * 0x632BE5AB ^ first) & mask
    bits = (bits ^ bits >> 16) * 0x85EBCA6B & mask
    bits ^= second ^ position * 0x85157AF5 & mask
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & mask
    bits = (bits ^ bits >> 16) & 0x7FFFFFFF
    expected = -math.log(-math.log1p(-(bits + 0.5) / 2**31))
    got = Gumbel(4096, CPU)(rows((seed, choice)), torch.tensor([position]))[0, token]
    assert got.item() == pytest.approx(expected, rel=1e-5)


def test_values_are_gumbel_distributed() -> None:
    noise = Gumbel(5000, CPU)(rows(*[(7919 * i, i % 3) for i in range(200)]), torch.arange(200))
    assert noise.isfinite().all()
    values = np.sort(uniform(noise).ravel())
    steps = (np.arange(values.size) + 0.5) / values.size
    assert np.abs(values - steps).max() * math.sqrt(values.size) < 1.95  # p = 0.001
    assert chi_square(np.histogram(values, 1000, (0, 1))[0]) < 4


@pytest.mark.parametrize(("position", "token"), [(14252, 1364), (29399, 3707)])
def test_the_highest_bits_give_finite_noise(position: int, token: int) -> None:
    """31 bits above 2**31 - 64, found by search: as fp32 they round to 2**31, the whole unit."""
    noise = Gumbel(4096, CPU)(rows((0, 0)), torch.tensor([position]))
    assert -3 < noise[0, token] < -2.7
    assert noise.isfinite().all()


def test_one_token_over_positions_is_uniform() -> None:
    noise = Gumbel(16, CPU)(rows((7, 0)).expand(20000, 2), torch.arange(20000))
    for column in uniform(noise).T:
        assert chi_square(np.histogram(column, 100, (0, 1))[0]) < 4


def test_no_dependence_between_neighbours() -> None:
    gumbel, positions = Gumbel(2048, CPU), torch.arange(300)

    def of(seed: int, choice: int) -> np.ndarray:
        return uniform(gumbel(rows((seed, choice)).expand(300, 2), positions))

    base = of(42, 0)
    assert joint(base[:-1], base[1:]) < 4  # positions
    assert joint(base[:, :-1], base[:, 1:]) < 4  # tokens
    assert joint(base[:-1, :-1], base[1:, 1:]) < 4
    for seed, choice in ((42, 1), (43, 0), (42 + 2**32, 0), (42 + 2**63, 0)):
        assert joint(base, of(seed, choice)) < 4
    assert joint(base[:-1], of(42, 1)[1:]) < 4


def test_winners_are_spread_over_the_vocabulary() -> None:
    noise = Gumbel(64, CPU)(rows((3, 0)).expand(20000, 2), torch.arange(20000))
    assert chi_square(np.bincount(noise.argmax(1).numpy(), minlength=64)) < 4


@pytest.mark.parametrize("vocab", [7, 13, 1001, 4097])
def test_a_row_is_the_same_in_any_batch(vocab: int) -> None:
    gumbel = Gumbel(vocab, CPU)
    of = rows(*[(seed, choice) for seed in range(5) for choice in range(2)])
    positions = torch.arange(10) * 7
    together = gumbel(of, positions)
    assert len({tuple(row.tolist()) for row in together}) == 10
    for i in range(10):
        assert torch.equal(together[i], gumbel(of[i : i + 1], positions[i : i + 1])[0])
    assert torch.equal(together[3:], gumbel(of[3:], positions[3:]))


def test_seeds_count_modulo_two_to_the_64() -> None:
    assert keys(-1, 0) == keys(2**64 - 1, 0)
    assert keys(2**64, 0) == keys(0, 0)
