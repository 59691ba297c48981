"""One token per row: the same ids as the sampler's, however rows and dtypes are mixed."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch

from kvrun.runtime.kernels import draw as twin
from kvrun.runtime.kernels.noise import Gumbel, keys
from kvrun.runtime.kernels.softcap import softcap
from kvrun.runtime.kernels.triton import draw as triton
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.sampling.sampler import Sampler, SampleRow

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    torch.manual_seed(0)
    with DEVICE:
        yield


@pytest.fixture(params=[twin, triton], ids=["twin", "triton"])
def kernel(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def keyed(rows: int) -> torch.Tensor:
    return torch.tensor([keys(7919 * i, i % 3) for i in range(rows)], dtype=torch.int32)


def sampled(
    logits: torch.Tensor, temperature: list[float], positions: torch.Tensor
) -> torch.Tensor:
    rows = [
        SampleRow(SamplingParams(temperature=t), 7919 * i, i % 3, [], [], ())
        for i, t in enumerate(temperature)
    ]
    sampler = Sampler(logits.shape[1], DEVICE)
    found = sampler.sample(logits.float(), sampler.prepare(rows), positions)
    assert found.finite.all()
    return found.ids


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("vocab", [1, 50, 1024, 5001])
def test_as_the_sampler_does(kernel: ModuleType, dtype: torch.dtype, vocab: int) -> None:
    temperature = [1.0, 0.0, 0.7, 2.5, 1e-3, 0.0, 100.0, 1.0]
    logits = (torch.randn(8, vocab + 8) * 4).to(dtype)[:, 3 : 3 + vocab]
    before = logits.clone()
    positions = torch.tensor([0, 5, 2**31 - 1, 77, 12, 8, 123456, 5])
    wanted = sampled(logits, temperature, positions)
    ids, finite = kernel.draw(logits, torch.tensor(temperature), keyed(8), positions)
    assert ids.tolist() == wanted.tolist()
    assert (ids.dtype, finite.dtype) == (torch.int64, torch.bool)
    assert finite.all()
    assert torch.equal(logits, before)
    again = kernel.draw(logits, torch.tensor(temperature), keyed(8), positions.int())[0]
    assert torch.equal(again, ids)


def test_flat_logits_are_drawn_by_noise_alone(kernel: ModuleType) -> None:
    """Draws whose winner lies anywhere in a row, far ahead of its rivals or close."""
    rows, vocab = 50, 1100
    positions = torch.arange(rows) * 31
    wanted = sampled(torch.zeros(rows, vocab), [1.0] * rows, positions)
    ids, _ = kernel.draw(torch.zeros(rows, vocab), torch.ones(rows), keyed(rows), positions)
    assert torch.equal(ids, wanted)
    assert len(set(ids.tolist())) > 40


def test_scores_that_rounding_makes_equal_go_to_the_lowest_id(kernel: ModuleType) -> None:
    """So large that noise is lost: all of a chunk has to be looked at again."""
    logits = torch.full((3, 3000), -50.0)
    logits[:, [2900, 1500, 1100]] = 3e9
    logits[1, 1100] = 2e9
    positions, temperature = torch.arange(3), [1.0, 0.5, 0.0]
    ids, finite = kernel.draw(logits, torch.tensor(temperature), keyed(3), positions)
    assert ids.tolist() == [1100, 1500, 1100] == sampled(logits, temperature, positions).tolist()
    assert finite.all()


def test_rough_quotients_do_not_decide(kernel: ModuleType) -> None:
    """Neighbours of fp32 whose quotients are equal, though not their products with 1 / T."""
    logits = torch.full((40, 1000), -50.0)
    logits[:, 100] = 3e9 + 256.0 * torch.arange(40)
    logits[:, 900] = logits[:, 100] + 256.0
    temperature = torch.rand(40) + 1.0
    pair, column = logits[:, [100, 900]], temperature[:, None]
    exact, rough = (pair / column).diff(), (pair * (1.0 / column)).diff()
    assert ((exact == 0) & (rough > 0)).any()
    positions = torch.arange(40)
    ids, _ = kernel.draw(logits, temperature, keyed(40), positions)
    assert torch.equal(ids, sampled(logits, temperature.tolist(), positions))


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_logits_go_to_the_lowest_id(kernel: ModuleType, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 2500).clamp(max=2).to(dtype)
    for row, places in enumerate(([2499, 7], [1024, 1023], [2047, 2048], [0, 2499])):
        logits[row, places] = 3.0
    ids, _ = kernel.draw(logits, torch.zeros(4), keyed(4), torch.arange(4))
    assert ids.tolist() == [7, 1023, 2047, 0]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_that_are_not_finite(
    kernel: ModuleType, temperature: float, dtype: torch.dtype
) -> None:
    vocab = 2100
    logits = (torch.randn(7, vocab) * 2).to(dtype)
    clean = logits.clone()
    logits[0, 1700] = NAN
    logits[1, 3] = INF
    logits[2] = -INF
    logits[3, ::2] = -INF  # hidden tokens are no fault
    logits[4] = -INF
    logits[4, 2099] = -1.0  # one that is left is the one that is drawn
    logits[5] = NAN
    column = torch.full((7,), temperature)
    positions = torch.arange(7)
    ids, finite = kernel.draw(logits, column, keyed(7), positions)
    assert finite.tolist() == [False, False, False, True, True, False, True]
    assert ((ids >= 0) & (ids < vocab)).all()
    assert ids[4] == 2099
    assert ids[3] % 2 == 1
    assert ids[6] == kernel.draw(clean, column, keyed(7), positions)[0][6]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_temperature_that_overflows_is_no_proper_draw(kernel: ModuleType) -> None:
    logits = torch.tensor([[3e38, 1.0], [3e38, 1.0]])
    ids, finite = kernel.draw(logits, torch.tensor([0.5, 1.0]), keyed(2), torch.arange(2))
    assert finite.tolist() == [False, True]
    assert ids[1] == 0


def test_out_and_draws_after_draws(kernel: ModuleType) -> None:
    """What the programs of a row share is as before after each draw, whatever its size."""
    for rows, vocab in ((3, 2100), (1, 5000), (3, 2100)):
        logits, positions = torch.randn(rows, vocab), torch.arange(rows)
        out = torch.full((rows,), -1), torch.zeros(rows, dtype=torch.bool)
        found = kernel.draw(logits, torch.ones(rows), keyed(rows), positions, out=out)
        assert found[0] is out[0]
        assert found[1] is out[1]
        assert torch.equal(out[0], sampled(logits, [1.0] * rows, positions))
        assert out[1].all()


SMALL = [triton.Shape(128, 4, 2, 1), triton.Shape(256, 1, 1, 1)]


@pytest.fixture(params=[*triton.SHAPES, *SMALL], ids=str)
def shaped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> triton.Shape:
    """However a row is cut; the small ones have many chunks."""
    monkeypatch.setattr(triton, "shape", lambda *_: request.param)
    return request.param


def same(
    logits: torch.Tensor, temperature: list[float], cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel draws, which is what its twin does."""
    rows = len(logits)
    rest = torch.tensor(temperature), keyed(rows), torch.arange(rows) * 31
    wanted, good = twin.draw(logits, *rest, cap=cap)
    ids, finite = triton.draw(logits, *rest, cap=cap)
    assert finite.tolist() == good.tolist()
    assert ids[good].tolist() == wanted[good].tolist()
    assert ((ids >= 0) & (ids < logits.shape[1])).all()
    return ids, finite


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("vocab", [1, 2048, 3001])
def test_every_shape(shaped: triton.Shape, vocab: int, cap: float | None) -> None:
    temperature = [0.0, 0.7, 100.0]
    for dtype in FLOATS:
        logits = (torch.randn(3, vocab + 8) * 4).to(dtype)[:, 3 : 3 + vocab]
        same(logits, temperature, cap)
    same(torch.zeros(3, vocab), temperature, cap)


def test_a_cap_is_that_of_softcap(kernel: ModuleType) -> None:
    logits = (torch.randn(20, 3000) * 20).bfloat16()
    rest = torch.arange(20) % 3 * 0.4, keyed(20), torch.arange(20)
    wanted, _ = twin.draw(softcap(logits, 30.0), *rest)
    ids, finite = kernel.draw(logits, *rest, cap=30.0)
    assert ids.tolist() == wanted.tolist()
    assert finite.all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of large powers
def test_capped_logits_that_are_equal_go_to_the_lowest_id(shaped: triton.Shape) -> None:
    """Different ones, large enough to be c alike in fp32."""
    logits = torch.randn(6, 2500)
    for row, places in enumerate(([2499, 7], [1024, 1023], [2047, 2048], [64, 65], [0, 2499])):
        logits[row, places] = torch.tensor([90.0, 60.0])
    logits[4, 2499] = 200.0
    logits[5] = 100.0 - torch.arange(2500) % 7
    wanted = [7, 1023, 2047, 64, 0, 0]
    assert same(logits, [0.0] * 6, 3.0)[0].tolist() == wanted
    assert same(logits.bfloat16(), [0.0] * 6, 3.0)[0].tolist() == wanted
    assert same(logits, [0.0] * 6)[0].tolist() == [2499, 1024, 2047, 64, 2499, 0]
    # Where noise is lost beside logits, these ties are drawn alike.
    assert same(logits, [1e-8] * 6, 3.0)[0].tolist() == wanted


@pytest.mark.parametrize(("cap", "temperature"), [(None, 0.5), (2.0, 0.5), (30.0, 1e-3)])
def test_neighbours_whose_bounds_are_alike(
    shaped: triton.Shape, cap: float | None, temperature: float
) -> None:
    """Two far ahead of all others, and noise that makes up for what one has less."""
    logits = torch.full((16, 700), -50.0)
    noise = Gumbel(700, DEVICE)(keyed(16), torch.arange(16) * 31)
    ahead = (noise[:, 650] - noise[:, 40]) * temperature
    for step in (-2e-4 * temperature, 2e-4 * temperature):  # noise may differ in its last bits
        logits[:, 40], logits[:, 650] = (ahead + step) / 2, -(ahead + step) / 2
        if cap is not None:
            pair = logits[:, [40, 650]] / cap
            logits[:, [40, 650]] = cap * pair.clamp(-0.9, 0.9).atanh()
        same(logits, [temperature] * 16, cap)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_what_is_not_finite_in_every_shape(
    shaped: triton.Shape, temperature: float, cap: float | None
) -> None:
    vocab = 2100
    logits = torch.randn(8, vocab)
    logits[0, 1700] = NAN
    logits[1, 3] = INF
    logits[2] = -INF
    logits[3, ::2] = -INF
    logits[4] = -INF
    logits[4, 2099] = 1.0
    logits[5] = NAN
    logits[6, 2099] = NAN
    ids, finite = same(logits, [temperature] * 8, cap)
    bad = [0, 5, 6] if cap else [0, 1, 2, 5, 6]
    assert (~finite).nonzero()[:, 0].tolist() == bad
    if cap is None:
        assert ids[4] == 2099
