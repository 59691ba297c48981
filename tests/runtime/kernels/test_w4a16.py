"""Products of codes: Triton against the twin, the twin against plain torch."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import w4a16 as twin
from kvrun.runtime.kernels.triton import _codes, w4a16
from kvrun.runtime.kernels.triton.w4a16 import Form
from kvrun.runtime.kernels.w4a16 import Coded

# A code enters as a part of a larger number, which costs some bits of fp32.
CLOSE = 1e-4
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FORMS = {
    "fma": Form(False, 4, 1, 128, rows=4),
    "carried": Form(False, 8, 1, 32, rows=4),
    "dot": Form(True, 16, 4, rows=16),
    "split": Form(True, 16, 4, rows=16, splits=3),
}
KINDS = ("int4", "int4-zero", "int4-float-zero", "table", "int8", "int8-zero", "fp8")
# No size fills its blocks.
N, K = 21, 608


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """A GPU if there is one: there the same kernels are compiled."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def matrix(kind: str, n: int = N, k: int = K, group: int = 32) -> Coded:
    group = max(group, 128) if kind == "fp8" else group
    groups = 1 if group >= k else -(-k // group)
    scale = torch.rand(n, groups) / 8 + 0.01
    zero = table = None
    bits = 4 if kind.startswith(("int4", "table")) else 8
    if kind == "fp8":
        codes = torch.randn(n, k).to(torch.float8_e4m3fn)
    else:
        codes = twin.pack(torch.randint(0, 1 << bits, (n, k), dtype=torch.uint8), bits)
        table = torch.randn(16) if kind == "table" else None
    if kind.endswith("zero"):
        zero = torch.randint(-8, 8, (n, groups), dtype=torch.int8)
        zero = zero + torch.rand(n, groups) if "float" in kind else zero
    return Coded(codes, scale, k, group, zero, table, bits=bits)


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    assert got.dtype == ref.dtype
    assert got.shape == ref.shape
    return float((got.double() - ref.double()).norm() / ref.double().norm())


@pytest.mark.parametrize("group", [32, 64, 128, 256, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_the_twin_is_its_definition(kind: str, group: int) -> None:
    """Each value by itself, from the words' bits on."""
    made = matrix(kind, 5, K, group)
    got = twin.dequantise(made, torch.float32)
    for n, k in [(0, 0), (1, 1), (2, 17), (3, 129), (4, 607), (0, 200)]:
        if made.codes.dtype is torch.int32:
            bits, block = made.bits, 1024 // made.bits
            word = int(made.codes[n, k // block * 32 + k % 32])
            code = word >> (bits * (k % block // 32)) & (1 << bits) - 1
            middle = 1 << bits - 1
            value = float(code - middle) if made.table is None else float(made.table[code])
        else:
            value = float(made.codes[n, k])
        g = k // made.group
        value -= 0.0 if made.zero is None else float(made.zero[n, g])
        assert float(got[n, k]) == pytest.approx(value * float(made.scale[n, g]), rel=1e-6)
    x = torch.randn(3, K)
    assert off(twin.linear(x, made), x @ got.t()) < 1e-6


def test_packing_is_reversible() -> None:
    for k in (1, 16, 127, 128, 300):
        for bits in (4, 8):
            codes = torch.randint(0, 1 << bits, (7, k), dtype=torch.uint8)
            assert torch.equal(twin.unpack(twin.pack(codes, bits), k, bits), codes)


def test_columns_in_another_order() -> None:
    made = matrix("int4", group=32)
    order = torch.randperm(K)
    shuffled = twin.dequantise(made._replace(order=order), torch.float32)
    assert torch.equal(shuffled[:, order], twin.dequantise(made, torch.float32))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(form: str, kind: str) -> None:
    made, x = matrix(kind), torch.randn(3, K)
    assert off(w4a16.run(FORMS[form], x, made), twin.linear(x, made)) < CLOSE


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("group", [128, 256, 512, 1 << 20])
def test_fields_of_4_bits_joined(group: int, zero: bool) -> None:
    """Values are scaled where the scale has x's dtype; else sums of groups are, whatever the form
    says."""
    made = matrix("int4-zero" if zero else "int4", group=group)
    made = twin.beside(made._replace(scale=made.scale.half()))
    x = torch.randn(20, K).half()
    assert w4a16._joins(torch.float16, made)
    assert not w4a16._joins(torch.bfloat16, made)
    for form in (FORMS["dot"], FORMS["split"], Form(True, 64, 4, rows=32, stages=3)):
        ref = twin.linear(x, made)
        assert off(w4a16.run(form._replace(joined=True), x, made), ref) < TOLERANCE[torch.float16]
    for other in (matrix("int4-float-zero", group=group), matrix("int4", group=64)):
        other = other._replace(scale=other.scale.half())
        assert not w4a16._joins(torch.float16, other)
        got = w4a16.run(FORMS["dot"]._replace(joined=True), x, other)
        assert off(got, twin.linear(x, other)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fields_of_8_bits_joined(dtype: torch.dtype) -> None:
    """Where a row has one scale and no zero."""
    x, whole = torch.randn(20, K).to(dtype), matrix("int8", group=1 << 20)
    groups, zero = matrix("int8", group=64), matrix("int8-zero", group=1 << 20)
    assert [w4a16._joins(dtype, made) for made in (whole, groups, zero)] == [True, False, False]
    for made in (whole, groups, zero):
        for form in (FORMS["dot"], FORMS["split"], Form(True, 64, 4, rows=32, stages=3)):
            got = w4a16.run(form._replace(joined=True), x, made)
            assert off(got, twin.linear(x, made)) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("kind", "act"),
    [("table", "silu"), ("int8", "gelu_tanh"), ("int8-zero", "relu"), ("fp8", "silu")],
)
def test_gates(kind: str, act: str) -> None:
    """A gate and its up are rows of the matrix that lie half of it apart; 21 of them fill no tile.
    Where tensor cores multiply, they are made behind the product."""
    made = matrix(kind, 2 * N, half := K // 2)
    for rows, given in ((1, {"norm": torch.rand(half) / 512, "eps": 1e-3}), (3, {}), (20, {})):
        x = torch.randn(rows, half) / (1 if given else 512)
        ref = twin.linear(x, made, gated=act, **given)
        if rows < 4 or w4a16.serves(rows, made):
            assert off(w4a16.linear(x, made, gated=act, **given), ref) < 2 * CLOSE
        for form in (FORMS["fma"], FORMS["carried"], FORMS["fma"]._replace(block_n=1)):
            if rows < 4:
                assert off(w4a16.run(form, x, made, gated=act, **given), ref) < 2 * CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["int4-zero", "int8-zero"])
def test_zeros_beside_scales(kind: str, dtype: torch.dtype) -> None:
    made = matrix(kind, group=64)
    made = made._replace(scale=made.scale.to(dtype))
    one = twin.beside(made)
    assert one.zero is not None
    assert one.scale.stride(-1) == one.zero.stride(-1) == 2
    x = torch.randn(3, K)
    for form in FORMS.values():
        assert off(w4a16.run(form, x, one), twin.linear(x, made)) < CLOSE
    ids = torch.tensor([3, 0, 20])
    assert torch.equal(twin.dequantise(one, dtype), twin.dequantise(made, dtype))
    assert torch.equal(w4a16.rows(one, ids, dtype), w4a16.rows(made, ids, dtype))
    assert twin.beside(matrix("int4-float-zero")).scale.stride(-1) == 1
    large = made._replace(zero=made.zero.short() - 120)
    assert twin.beside(large) is large


@pytest.mark.parametrize("group", [32, 64, 128, 256, 1 << 20])
@pytest.mark.parametrize("form", ["fma", "dot", "split"])
def test_groups(form: str, group: int) -> None:
    for kind in ("int4-zero", "int8-zero"):
        made, x = matrix(kind, group=group), torch.randn(2, K)
        assert off(w4a16.run(FORMS[form], x, made), twin.linear(x, made)) < CLOSE


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("form", ["fma", "dot"])
def test_dtypes_and_sums(form: str, dtype: torch.dtype) -> None:
    x, bias = torch.randn(3, K).to(dtype), torch.randn(N).to(dtype)
    for kind in ("int4-zero", "table", "int8"):
        made, add = matrix(kind, group=32), torch.randn(3, N).to(dtype)
        ref = twin.linear(x, made, bias=bias, add=add)
        got = w4a16.run(FORMS[form], x, made, bias=bias, add=add, out=add)
        assert got is add
        assert off(got, ref) < TOLERANCE[dtype]


@pytest.mark.parametrize("options", [{"norm": True}, {"act": "silu"}, {"act": "gelu_tanh"}])
@pytest.mark.parametrize("kind", ["int4", "int4-zero", "int8"])
def test_norms_and_gates(kind: str, options: dict[str, Any]) -> None:
    made = matrix(kind, group=32)
    x = torch.randn(3, 2 * K if "act" in options else K)
    if "norm" in options:
        options = {"norm": torch.rand(K) + 0.5, "eps": 1e-3}
    got = w4a16.run(FORMS["fma"], x, made, **options)
    assert off(got, twin.linear(x, made, **options)) < CLOSE


def test_rows_apart() -> None:
    made, x = matrix("int4"), torch.randn(3, K + 24)[:, 8 : 8 + K]
    wide = torch.zeros(3, N + 5)
    for form in FORMS.values():
        w4a16.run(form, x, made, out=wide[:, :N])
        assert off(wide[:, :N], twin.linear(x, made)) < CLOSE
        assert not wide[:, N:].any()


@pytest.mark.parametrize("m", [0, 1, 2, 7, 16, 33, 64, 100, 200])
@pytest.mark.parametrize("group", [64, 128, 1 << 20])
@pytest.mark.parametrize("kind", ["int4-zero", "int8"])
def test_the_form_it_chooses_itself(m: int, group: int, kind: str) -> None:
    made, x = matrix(kind, 24, 2048, group), torch.randn(m, 2048).half()
    made = twin.beside(made._replace(scale=made.scale.half()))
    got = w4a16.linear(x, made)
    assert got.shape == (m, 24)
    assert m == 0 or off(got, twin.linear(x, made)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("group", [128, 1 << 20])
@pytest.mark.parametrize("kind", ["int4", "int4-zero"])
def test_one_row_that_stays(kind: str, group: int, dtype: torch.dtype) -> None:
    """By more programs than tiles, by one for all, and by some that come to few tiles."""
    made = matrix(kind, group=group)
    made = twin.beside(made._replace(scale=made.scale.to(torch.bfloat16)))
    x, bias, norm = torch.randn(1, K).to(dtype), torch.randn(N).to(dtype), torch.rand(K) + 0.5
    for block_n, programs in ((4, 1), (8, 2), (4, 9)):
        form = Form(False, block_n, 1, 128, turning=programs)
        assert off(w4a16.run(form, x, made), twin.linear(x, made)) < TOLERANCE[dtype]
        options: dict[str, Any] = {"bias": bias, "add": torch.randn(1, N).to(dtype)}
        options |= {"norm": norm, "eps": 1e-3}
        ref = twin.linear(x, made, **options)
        got = w4a16.run(form, x, made, **options, out=options["add"])
        assert got is options["add"]
        assert off(got, ref) < TOLERANCE[dtype]


def test_which_single_rows_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with a gate, with long rows, with small groups or with zeros that lie apart."""
    forms: list[Form] = []
    monkeypatch.setattr(w4a16, "run", lambda form, x, matrix, **_: forms.append(form))
    w4a16.linear(torch.randn(1, K), matrix("int4", group=128))
    assert forms.pop().turning
    others = [
        (matrix("int4", group=128), {"act": "silu"}, 1),
        (matrix("int4", group=64), {}, 1),
        (matrix("int4-zero", group=128), {}, 1),
        (matrix("int4", k=8192, group=128), {}, 1),
        (matrix("int8", group=128), {}, 1),
        (matrix("int4", group=128), {}, 2),
    ]
    for made, options, rows in others:
        w4a16.linear(torch.randn(rows, made.columns), made, **options)
        assert not forms.pop().turning


@pytest.mark.parametrize("form", ["dot", "split"])
def test_several_tiles_of_rows(form: str) -> None:
    made, x = matrix("int4-zero", 40, 1024, 32), torch.randn(37, 1024)
    for _ in range(2):  # counters are as before
        assert off(w4a16.run(FORMS[form], x, made), twin.linear(x, made)) < CLOSE


@pytest.mark.parametrize("group", [32, 128, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, group: int) -> None:
    made = matrix(kind, group=group)
    got = w4a16.dequantise(made, torch.float32)
    assert off(got, twin.dequantise(made, torch.float32)) < 1e-5
    ids = torch.tensor([N - 1, 0, 3, 3])
    ref = twin.dequantise(made, torch.float32)[ids]
    assert torch.equal(twin.rows(made, ids, torch.float32), ref)
    assert off(w4a16.rows(made, ids, torch.float32), ref) < 1e-5


@pytest.mark.parametrize("m", [1, 4, 5, 16, 33, 64, 100, 256])
@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize(
    ("n", "k"), [(6144, 4096), (4096, 14336), (128256, 4096), (1024, 576), (8, 8)]
)
def test_forms_fit_the_device(m: int, kind: str, n: int, k: int) -> None:
    """The parts of K are all there and none is empty; counters suffice."""
    form = w4a16.config(m, n, k, kind, 132)
    words = -(-k // (128 if kind in ("int8", "fp8") else 256)) * 32
    span, splits = w4a16._cut(form, words)
    assert (splits - 1) * span < words <= splits * span
    assert span % 32 == 0
    assert splits == 1 or -(-n // form.block_n) * -(-m // form.rows) <= 1 << 14


@pytest.mark.parametrize("room", [99 << 10, 163 << 10, 227 << 10])
@pytest.mark.parametrize("kind", ["int4", "int8"])
@pytest.mark.parametrize("group", [32, 64, 1 << 20])
def test_tiles_fit_into_shared_memory(kind: str, group: int, room: int) -> None:
    """Scales and zeros in fp32 lie there, too: one for each group of a block of words."""
    bits, made = int(kind[3:]), matrix(f"{kind}-float-zero", group=group)
    groups = max(1, 1024 // bits // group)
    assert made.scale.itemsize == 4
    for m in (2, 16, 64, 256):
        form = w4a16.config(m, 4096, 4096, kind, 132)
        form = w4a16.fitting(form, bits, w4a16._wide(made), room)
        rows = 2 * (1024 // bits) * form.rows  # of x, in 16 bits
        each = rows + 2 * 4 * form.block_n * groups
        assert form.stages * each + 2 * form.block_n * 128 <= room
        assert form.rows >= 16


def test_long_rows_of_4_bits_leave_gates_to_others() -> None:
    short, long = matrix("int4", 4, 8192, 128), matrix("int4", 4, 14336, 128)
    assert w4a16.takes_in(1, short)
    assert not w4a16.takes_in(1, long)
    assert w4a16.takes_in(1, matrix("int8", 4, 14336, 128))


def test_the_twin_is_what_the_layers_compute() -> None:
    made, x = matrix("int4", group=32), torch.randn(3, K)
    weight, norm = twin.dequantise(made, torch.float32), torch.rand(K)
    ref = F.linear(F.rms_norm(x, (K,), norm, 1e-3), weight)
    assert off(twin.linear(x, made, norm=norm, eps=1e-3), ref) < 1e-6


def run_ptx(text: str, words: list[int]) -> list[int]:
    """The registers that a few instructions leave: outputs first, then inputs, as the assembly of
    `_codes` numbers them."""
    kind = torch.bfloat16 if "bf16x2" in text else torch.float16
    found: dict[str, int] = {}
    outputs = len(re.findall(r"^sub\.", text, re.M))
    found |= {f"${outputs + i}": word & 0xFFFFFFFF for i, word in enumerate(words)}

    def get(name: str) -> int:
        return found[name] if name in found else int(name, 0)

    def halves(word: int) -> torch.Tensor:
        pair = torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16)
        return pair.view(kind)

    for name, operands in re.findall(r"^(\w+)\.\w+ (.*);$", text, re.M):
        to, *given = operands.split(", ")
        a = [get(one) for one in given]
        if name == "lop3":
            table = a.pop()
            bits = [tuple(value >> i & 1 for value in a) for i in range(32)]
            made = sum((table >> (4 * x + 2 * y + z) & 1) << i for i, (x, y, z) in enumerate(bits))
        elif name == "prmt":
            both = a[0].to_bytes(4, "little") + a[1].to_bytes(4, "little")
            made = sum(both[a[2] >> (4 * i) & 7] << (8 * i) for i in range(4))
        elif name == "sub":
            low, high = (halves(a[0]) - halves(a[1])).view(torch.int16).tolist()
            made = (low & 0xFFFF) | (high & 0xFFFF) << 16
        else:
            assert name in ("shr", "mov")
            made = a[0] >> a[1] if name == "shr" else a[0]
        found[to] = made & 0xFFFFFFFF
    return [found[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_assembly_makes_the_values_of_codes(bits: int, dtype: torch.dtype) -> None:
    """Every code in every field, of both words, less the zeros that come with 4 bits."""
    text = _codes._of_words(f"int{bits}", "bf16x2" if dtype is torch.bfloat16 else "f16x2")
    count, mask = 32 // bits, (1 << bits) - 1
    zeros = (-8, 5) if bits == 4 else (0, 0)
    base = 128 if dtype is torch.bfloat16 else 1024  # the least number whose last bit is 1
    pairs = [torch.tensor([base + 8 + zero] * 2, dtype=dtype).view(torch.int32) for zero in zeros]
    for code in range(0, 1 << bits, 1 if bits == 4 else 5):
        codes = [[(code + 7 * f + 3 * w) & mask for f in range(count)] for w in range(2)]
        words = [sum(c << (bits * f) for f, c in enumerate(row)) for row in codes]
        for field, register in enumerate(run_ptx(text, [*words, *map(int, pairs)])):
            pair = torch.tensor([register & 0xFFFF, register >> 16], dtype=torch.int32)
            values = pair.to(torch.int16).view(dtype).tolist()
            middle = (1 << bits - 1) + zeros[field * 2 // count]
            assert values == [codes[w][field] - middle for w in range(2)]
