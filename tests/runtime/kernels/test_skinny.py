"""The product of few rows: Triton against the twin, the twin against torch."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import skinny as twin
from kvrun.runtime.kernels.triton import skinny
from kvrun.runtime.kernels.triton.skinny import Form

EPS = 1e-3
FORMS = {
    "carried": Form(dot=False, block_n=4, block_k=256, warps=1, stages=0),
    "direct": Form(dot=False, block_n=4, block_k=256, warps=1, stages=1),
    "dot": Form(dot=True, block_n=16, block_k=32, warps=4, stages=2),
    "split": Form(dot=True, block_n=16, block_k=32, warps=4, stages=2, splits=3),
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
# No size fills its blocks; 75 columns cannot be loaded in pairs.
N, K = 37, 104


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """A GPU if there is one: there the same kernels are compiled."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def arguments(
    m: int, n: int = N, k: int = K, dtype: torch.dtype = torch.float32, **options: Any
) -> dict[str, Any]:
    """Fresh random arguments; `norm`, `bias`, `add` = True are replaced by tensors."""
    x = torch.randn(m, 2 * k if "act" in options else k).to(dtype)
    given = {"x": x, "weight": torch.randn(n, k).to(dtype), **options}
    if "norm" in given:
        given |= {"norm": torch.rand(k) + 0.5, "eps": EPS}
    if "bias" in given:
        given["bias"] = torch.randn(n).to(dtype)
    if "add" in given:
        given["add"] = torch.randn(m, n).to(dtype)
    return given


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    assert got.dtype == ref.dtype
    assert got.shape == ref.shape
    return float((got.double() - ref.double()).norm() / ref.double().norm())


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> Form:
    return FORMS[request.param]


@pytest.mark.parametrize("m", [1, 2, 5, 8, 16])
def test_rows(form: Form, m: int) -> None:
    given = arguments(m)
    assert off(skinny.run(form, **given), twin.linear(**given)) < 1e-6


@pytest.mark.parametrize("m", [17, 32, 33, 64])
@pytest.mark.parametrize("form", ["dot", "split"], indirect=True)
@pytest.mark.parametrize("options", [{"bias": True, "add": True}, {"gated": "silu"}], ids=str)
def test_more_rows(form: Form, m: int, options: dict[str, Any]) -> None:
    given = arguments(m, 38 if "gated" in options else N, **options)
    assert off(skinny.run(form, **given), twin.linear(**given)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", [{"norm": True, "bias": True}, {"act": "silu", "add": True}])
def test_prologues_and_sums(form: Form, dtype: torch.dtype, options: dict[str, Any]) -> None:
    given = arguments(3, dtype=dtype, **options)
    assert off(skinny.run(form, **given), twin.linear(**given)) < TOLERANCE[dtype]


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("form", ["direct", "dot"], indirect=True)
def test_activations(form: Form, act: str) -> None:
    given = arguments(2, act=act)
    assert off(skinny.run(form, **given), twin.linear(**given)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_a_gate_behind_the_product(form: Form, act: str, dtype: torch.dtype) -> None:
    given = arguments(3, 38, dtype=dtype, norm=True, gated=act)
    given["weight"] /= 10  # gates between -3 and 3, where the activations differ
    got = skinny.run(form, **given)
    assert got.shape == (3, 19)
    assert off(got, twin.linear(**given)) < 2 * TOLERANCE[dtype]  # of two factors


def test_a_gate_and_its_up_are_in_one_tile(form: Form) -> None:
    given = arguments(1, 6, gated="silu")
    got = skinny.run(form if form.dot else form._replace(block_n=1), **given)
    gate, up = F.linear(given["x"], given["weight"]).chunk(2, 1)
    assert off(got, F.silu(gate) * up) < 1e-6


@pytest.mark.parametrize(("n", "k"), [(17, 8), (50, 75), (64, 512)])
def test_sizes(form: Form, n: int, k: int) -> None:
    given = arguments(2, n, k, torch.bfloat16, norm=True)
    assert off(skinny.run(form, **given), twin.linear(**given)) < 1e-2


def test_rows_apart_and_a_sum_in_place(form: Form) -> None:
    """x and weight are parts of wider matrices; the residual is updated where it is."""
    given = arguments(3, add=True)
    given["x"] = torch.randn(3, K + 24)[:, 8 : 8 + K]
    given["weight"] = torch.randn(N, K + 8)[:, :K]
    given["add"] = wide = torch.randn(3, N + 5)[:, :N]
    ref, beside = twin.linear(**given), wide.as_strided((3, 5), wide.stride(), N).clone()
    got = skinny.run(form, **given, out=wide)
    assert got is wide
    assert off(got, ref) < 1e-6
    assert torch.equal(wide.as_strided((3, 5), wide.stride(), N), beside)


def test_again_and_with_other_sizes_between(form: Form) -> None:
    """Counters are back at zero after each call, and equal calls give equal bits."""
    given, other = arguments(2, norm=True), arguments(4, n=90)
    first = skinny.run(form, **given)
    assert off(skinny.run(form, **other), twin.linear(**other)) < 1e-6
    assert torch.equal(skinny.run(form, **given), first)


@pytest.mark.parametrize("form", ["dot", "split"], indirect=True)
def test_a_norm_of_values_near_the_limit_of_fp16(form: Form) -> None:
    given = arguments(2, dtype=torch.float16, norm=True)
    given["x"] = given["x"].mul_(2e4).clamp_(-6e4, 6e4)
    given["norm"] += 9
    got = skinny.run(form, **given)
    assert got.isfinite().all()
    assert off(got, twin.linear(**given)) < 1e-3


def test_one_bad_row_stays_alone(form: Form) -> None:
    """What is not a number in one row does not reach the others."""
    given = arguments(3, act="silu")
    ref = twin.linear(**given)
    given["x"][1] = float("nan")
    got = skinny.run(form, **given)
    assert got[1].isnan().all()
    assert off(got[::2], ref[::2]) < 1e-6


@pytest.mark.parametrize("m", [0, 1, 6, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_form_it_chooses_itself(m: int, dtype: torch.dtype) -> None:
    given = arguments(m, 24, 64, dtype, norm=True)
    ref = twin.linear(**given)
    got = skinny.linear(**given)
    assert got.shape == (m, 24)
    assert m == 0 or off(got, ref) < TOLERANCE[dtype]


# KiB: of consumers' cards, an A100, an H100.
@pytest.mark.parametrize(("room", "overlap"), [(99, False), (99, True), (163, False), (227, True)])
@pytest.mark.parametrize("m", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize(
    ("n", "k"),
    [(6144, 4096), (4096, 14336), (128256, 4096), (1024, 3072), (4096, 2304), (18432, 2304),
     (6144, 1024), (151936, 1024), (896, 896), (16, 264), (8, 8)],
)  # fmt: skip
def test_forms_fit_the_device(m: int, n: int, k: int, room: int, overlap: bool) -> None:
    """The parts of K are all there and none is empty; counters and shared memory suffice."""
    for dtype in (torch.float32, torch.bfloat16):
        form = skinny.config(m, n, k, dtype, 132, room << 10, overlap=overlap)
        span, splits = skinny._cut(form, k)
        assert (splits - 1) * span < k <= splits * span
        assert splits == 1 or -(-n // form.block_n) <= skinny._COUNTERS
        weight = torch.empty(n, k, dtype=dtype, device="meta")
        assert 0 <= skinny._ahead(form, weight) <= k - (splits - 1) * span
        assert form.block_n <= 32 * form.warps
        rows = skinny._rows(m, form.dot)
        act = skinny.takes_in(m, dtype)  # a gate beside its up, or a norm
        tile = (form.block_n + (1 + act) * rows) * dtype.itemsize + 4 * act
        assert form.block_k * form.block_n >= 32 * form.warps  # no thread without a weight
        assert form.stages < 2 or form.stages * tile * form.block_k <= room << 10


def test_which_products_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows are of any matrix; more of one that is no head, where kernels overlap."""

    def served(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> list[int]:
        weight = torch.empty(n, k, dtype=dtype, device="meta")
        return [m for m in (0, 1, 8, 16, 17, 64, 65) if skinny.serves(m, weight)]

    monkeypatch.setattr(skinny, "overlap", lambda device: {"PDL": True})
    assert served(4096, 4096) == [1, 8, 16, 17, 64]
    assert served(1024, 2048) == [1, 8, 16, 17, 64]
    assert served(151936, 1024) == [1, 8, 16]
    assert served(4096, 4096, torch.float32) == [1, 8]
    monkeypatch.setattr(skinny, "overlap", lambda device: {"PDL": False})
    assert served(4096, 4096) == [1, 8, 16]
    assert [m for m in (0, 1, 16, 17) if skinny.takes_in(m, torch.bfloat16)] == [1, 16]


def test_the_twin_is_what_the_layers_compute() -> None:
    given = arguments(3, norm=True, bias=True, add=True)
    row = F.rms_norm(given["x"], (K,), given["norm"], EPS)
    ref = F.linear(row, given["weight"], given["bias"]) + given["add"]
    assert off(twin.linear(**given), ref) < 1e-6
    for act, torchs in {
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "relu": F.relu,
    }.items():
        given = arguments(3, act=act)
        gate, up = given["x"].chunk(2, -1)
        out = torch.empty(3, N)
        assert twin.linear(**given, out=out) is out
        assert off(out, F.linear(torchs(gate) * up, given["weight"])) < 1e-6
