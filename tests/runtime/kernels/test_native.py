"""The kernels in C against their twins in plain torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kvrun.runtime.kernels import rotary as rotary_twin
from kvrun.runtime.kernels import w4a16 as twin
from kvrun.runtime.kernels.native import _build, one_query, rotary, w4a16
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.w4a16 import Coded
from kvrun.runtime.quant import _coded, _round

SOURCE = Path(w4a16.__file__).with_suffix(".c")
compiled = pytest.mark.skipif(not w4a16.available(), reason="there is no C compiler here")


def coded(n: int, k: int, bits: int, group: int, symmetric: bool = False) -> Coded:
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(n + k))
    made = _round.whole(weight, bits, group, symmetric=symmetric, dtype=torch.bfloat16)
    return _coded.affine(made.codes, made.scale, made.zero, bits, torch.arange(k) // group)


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got.double() - ref.double()).norm() / ref.double().norm())


def eight(x: torch.Tensor) -> torch.Tensor:
    """Rows as 8 bits hold them, each 64 columns by their largest value."""
    blocks = x.float().view(len(x), -1, 64)
    most = blocks.abs().amax(-1, keepdim=True)
    return ((blocks * (127 / most)).round() * (most / 127)).flatten(1)


SHAPES = [(8, 64, 4, 64), (10, 192, 4, 64), (67, 256, 4, 128), (5, 128, 4, 128),
          (8, 64, 8, 64), (10, 192, 8, 192), (67, 256, 8, 128)]  # fmt: skip
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 4e-3}


@compiled
@pytest.mark.parametrize(("n", "k", "bits", "group"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_values(n: int, k: int, bits: int, group: int, dtype: torch.dtype) -> None:
    """Of rows in 8 bits; values are the twin's to the bit."""
    matrix, bias = coded(n, k, bits, group, symmetric=bits == 8), torch.randn(n)
    assert w4a16.takes(matrix)
    stored, values = w4a16.Stored(matrix, bias), twin.dequantise(matrix, dtype)
    for rows in (1, 2, 5):
        x, add = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
        ref = eight(x) @ values.float().t() + bias + add.float()
        assert off(stored.linear(x, add=add), ref) < CLOSE[dtype]
        assert stored.linear(x, add=add, out=add) is add
        assert off(add, ref) < CLOSE[dtype]
    assert torch.equal(stored.values(dtype, 2, n), values[2:])
    ids = torch.tensor([n - 1, 0, 3, 3])
    assert torch.equal(stored.values(dtype, 0, 0, ids), values[ids])


@compiled
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
def test_what_comes_before_is_taken_in(act: str) -> None:
    matrix = coded(12, 128, 4, 64)
    stored, values = w4a16.Stored(matrix), twin.dequantise(matrix, torch.float32).t()
    both = 4 * torch.randn(3, 256)
    row = twin.activate(both[:, :128], act) * both[:, 128:]
    assert off(stored.linear(both, act=act), eight(row) @ values) < 1e-4
    x, norm = torch.randn(3, 128), torch.rand(128) + 0.5
    row = torch.nn.functional.rms_norm(x, (128,), norm, 1e-2)
    assert off(stored.linear(x, norm=norm, eps=1e-2), eight(row) @ values) < 1e-4
    # A gate's values themselves, by a matrix that hands each of them on.
    codes = torch.full((64, 64), 128, dtype=torch.uint8) + 127 * torch.eye(64, dtype=torch.uint8)
    one = _coded.affine(codes, torch.full((64, 1), 1 / 127), None, 8, torch.zeros(64).long())
    both = torch.ones(181, 128)
    both[:, :64] *= torch.linspace(-90, 90, 181).view(-1, 1)
    ref = twin.activate(both[:, :64], act)
    assert_close(w4a16.Stored(one).linear(both, act=act), ref, rtol=2e-5, atol=1e-6)


@compiled
def test_rows_do_not_see_each_other_and_threads_change_nothing() -> None:
    matrix = coded(300, 128, 4, 64)
    stored, x = w4a16.Stored(matrix), torch.randn(6, 128)
    alone = torch.cat([stored.linear(row[None]) for row in x])
    assert torch.equal(stored.linear(x), alone)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(stored.linear(x), alone)
    finally:
        torch.set_num_threads(threads)


@compiled
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_stays_so(bits: int, value: float) -> None:
    stored, x = w4a16.Stored(coded(9, 128, bits, 128, symmetric=bits == 8)), torch.ones(2, 128)
    x[0, 70] = value
    y = stored.linear(x)
    assert not y[0].isfinite().any()
    assert y[1].isfinite().all()


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "count"),
    [(9, 3, 64, 70), (4, 4, 80, 1), (8, 1, 18, 33), (2, 1, 256, 300)],
)
def test_one_query(heads: int, kv_heads: int, dim: int, count: int, dtype: torch.dtype) -> None:
    """Scores far apart, more keys than are looked at at once, a head of odd width; threads."""
    q, rows = (3 * torch.randn(1, heads, dim)).to(dtype), torch.randn(count, 2 * kv_heads * dim)
    rows = rows.to(dtype)
    assert one_query.takes(heads, kv_heads, dim, dtype)
    k, v = rows.double().view(count, 2, kv_heads, dim).unbind(1)
    parts = q.double().view(kv_heads, -1, dim)
    weights = torch.einsum("hsd,thd->hst", parts, k).mul(0.5).softmax(-1)
    ref = torch.einsum("hst,thd->hsd", weights, v).reshape(1, -1)
    got = one_query.attend(q, rows, kv_heads, 0.5)
    assert off(got, ref) < CLOSE[dtype]
    before = torch.get_num_threads(), one_query._ALONE
    torch.set_num_threads(2)
    one_query._ALONE = 0
    try:
        assert torch.equal(one_query.attend(q, rows, kv_heads, 0.5), got)
    finally:
        torch.set_num_threads(before[0])
        one_query._ALONE = before[1]
    rows[-1, 0] = float("nan")
    assert not one_query.attend(q, rows, kv_heads, 0.5)[0, :dim].isfinite().any()


@compiled
@pytest.mark.parametrize("dim", [64, 264])
def test_rotation_by_threads_and_of_wide_heads(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the twin turns; tests/runtime/kernels/test_rotary.py has the rest."""
    qkv, slots = torch.randn(7, 4 * dim), torch.tensor([3, 0, 8, 1, 2, 7, 5])
    rotation = Rotation(*rotary.tables(torch.arange(7), torch.rand(dim // 2), 1.0))
    ref, kept = qkv.clone(), torch.zeros(9, 2 * dim)
    rotary_twin.rotate_append(ref, rotation, kept, slots, 1, dim)
    monkeypatch.setattr(rotary, "_ALONE", 0)
    threads, cache = torch.get_num_threads(), torch.zeros(9, 2 * dim)
    torch.set_num_threads(2)
    try:
        rotary.rotate_append(qkv, rotation, cache, slots, 1, dim)
    finally:
        torch.set_num_threads(threads)
    assert_close((qkv, cache), (ref, kept), rtol=1e-6, atol=1e-6)


def test_what_the_kernel_has_no_form_for() -> None:
    matrix = coded(8, 128, 4, 64)
    assert w4a16.takes(matrix)
    fractions = torch.full_like(matrix.scale, 0.5)
    others: list[dict[str, Any]] = [
        {"zero": fractions}, {"zero": torch.full(matrix.scale.shape, 248)},
        {"zero": torch.full(matrix.scale.shape, -9)}, {"table": torch.zeros(16)},
    ]  # fmt: skip
    assert not any(w4a16.takes(matrix._replace(**other)) for other in others)
    assert not w4a16.takes(coded(8, 96, 4, 32))
    assert not w4a16.takes(coded(8, 128, 4, 32))


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "kvrun"
    w4a16._library.cache_clear()


@compiled
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs an x86 Linux")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3"])
def test_other_cpus(level: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forms for CPUs with AVX2, and with nothing, give the sums of this CPU's form."""
    x = torch.randn(3, 256)
    matrices = [coded(10, 256, bits, 128, symmetric=bits == 8) for bits in (4, 8)]
    here = [w4a16.Stored(matrix).linear(x) for matrix in matrices]
    own_cache.mkdir(parents=True, exist_ok=True)
    before = set(own_cache.iterdir())
    flags = [f"-march={level}" if f == "-march=native" else f for f in _build.FLAGS]
    monkeypatch.setattr(_build, "FLAGS", ["-O1", *flags[1:]])
    w4a16._library.cache_clear()
    there = [w4a16.Stored(matrix).linear(x) for matrix in matrices]
    assert len(set(own_cache.iterdir()) - before) == 1  # compiled anew
    assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_without_a_compiler(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_build, "_compiler", lambda: None)
    assert _build.compiled(SOURCE) is None
    assert not own_cache.exists()


@compiled
def test_with_a_compiler_that_fails(own_cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.c"
    broken.write_text("this is not C\n")
    assert _build.compiled(broken) is None
    assert not list(own_cache.iterdir())


@compiled
def test_a_home_that_cannot_be_written_to(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_cache.parent.write_text("a file where the folder would be")
    source = tmp_path / "one.c"
    source.write_text("int one(void) { return 1; }\n")
    found = _build.compiled(source)
    assert found is not None
    assert found.one() == 1
