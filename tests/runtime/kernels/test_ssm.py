"""Scans against the recurrences they stand for, written out in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import ssm

LENGTHS = [150, 1, 97]  # of sequences that are padded to the longest
LONGEST = max(LENGTHS)


def noise(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(*shape: int) -> torch.Tensor:
    """dt [3, 150, ...], zero where there is no token."""
    dt = F.softplus(noise(3, LONGEST, *shape, seed=1))
    for row, length in enumerate(LENGTHS):
        dt[row, length:] = 0
    return dt


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("states", [1, 1 << 23], ids=["token by token", "chunks"])
def test_selective_scan(states: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssm, "STATES", states)
    x, dt, a = noise(3, LONGEST, 6, seed=2), steps(6), -noise(6, 5, seed=3).exp()
    b, c = noise(3, LONGEST, 5, seed=4), noise(3, LONGEST, 5, seed=5)
    first = noise(3, 6, 5, seed=6)
    found, last = ssm.selective_scan(x, dt, a, b, c, first.clone())
    for row, length in enumerate(LENGTHS):
        h = first[row].double()
        stepped = first[row : row + 1].clone()
        for t in range(length):
            d = dt[row, t].double()[:, None]
            h = (d * a).exp() * h + d * x[row, t].double()[:, None] * b[row, t].double()
            near(found[row, t], h @ c[row, t].double())
            y, stepped = ssm.selective_step(
                x[row : row + 1, t], dt[row : row + 1, t], a, b[row : row + 1, t],
                c[row : row + 1, t], stepped,
            )  # fmt: skip
            near(y[0], h @ c[row, t].double())
        near(last[row], h)
        near(stepped[0], h)


def test_ssd_scan() -> None:
    """Six heads of three groups; the longest sequence crosses two borders of chunks."""
    assert 2 * ssm.CHUNK < LONGEST < 3 * ssm.CHUNK
    x, dt, a = noise(3, LONGEST, 6, 4, seed=2), steps(6), -noise(6, seed=3).exp()
    b, c = noise(3, LONGEST, 3, 5, seed=4), noise(3, LONGEST, 3, 5, seed=5)
    first = noise(3, 6, 4, 5, seed=6)
    found, last = ssm.ssd_scan(x, dt, a, b, c, first.clone())
    group = torch.arange(6) // 2
    for row, length in enumerate(LENGTHS):
        h = first[row].double()
        stepped = first[row : row + 1].clone()
        for t in range(length):
            d = dt[row, t].double()
            given = x[row, t].double()[:, :, None] * b[row, t].double()[group][:, None]
            h = (d * a).exp()[:, None, None] * h + d[:, None, None] * given
            y = (h * c[row, t].double()[group][:, None]).sum(-1)
            near(found[row, t], y)
            one, stepped = ssm.ssd_step(
                x[row : row + 1, t], dt[row : row + 1, t], a, b[row : row + 1, t],
                c[row : row + 1, t], stepped,
            )  # fmt: skip
            near(one[0], y)
        near(last[row], h)
        near(stepped[0], h)


def test_steep_decays_neither_overflow_nor_vanish_into_nan() -> None:
    """Logs of decays add up to -3000 within a chunk: only their differences may be raised."""
    x, b = torch.ones(1, 70, 1, 1), torch.ones(1, 70, 1, 1)
    y, last = ssm.ssd_scan(x, torch.full((1, 70, 1), 50.0), torch.tensor([-1.0]), b, b,
                           torch.full((1, 1, 1, 1), 1e30))  # fmt: skip
    assert torch.isfinite(y).all()
    assert y[0, -1].item() == last.item() == 50.0


def test_convolution_and_its_window() -> None:
    x, window = noise(3, LONGEST, 6, seed=1), noise(3, 3, 6, seed=2)
    weight, bias = noise(6, 4, seed=3), noise(6, seed=4)
    both = torch.cat((window, x), 1)
    expected = F.conv1d(both.transpose(1, 2), weight[:, None], bias, groups=6).transpose(1, 2)
    torch.testing.assert_close(ssm.causal_conv(x, window, weight, bias), expected)
    torch.testing.assert_close(ssm.causal_conv(x, window, weight, None), expected - bias)
    found = ssm.last_inputs(x, window, torch.tensor(LENGTHS))
    for row, length in enumerate(LENGTHS):
        assert torch.equal(found[row], both[row, length : length + 3])
    assert torch.equal(ssm.last_inputs(x[:, :2], window, None), both[:, 2:5])
