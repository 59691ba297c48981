"""One row times codes of 4 bits by tensor cores: against the twin, and its assembly by itself."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels import w4a16 as twin
from kvrun.runtime.kernels.triton import _row_dot, w4a16
from kvrun.runtime.kernels.triton.w4a16 import Form
from kvrun.runtime.kernels.w4a16 import Coded

BF16, F16 = torch.bfloat16, torch.float16
TOLERANCE = {BF16: 1e-2, F16: 2e-3}
# Outputs, columns: no size fills its blocks; all do; a group begins within the last words.
SIZES = {"uneven": (21, 608), "even": (32, 1024), "long": (9, 2432)}


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """A GPU if there is one: there the same kernels are compiled."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


def matrix(n: int, k: int, group: int, zero: bool, dtype: torch.dtype = torch.bfloat16) -> Coded:
    groups = 1 if group >= k else -(-k // group)
    codes = twin.pack(torch.randint(0, 16, (n, k), dtype=torch.uint8), 4)
    scale = (torch.rand(n, groups) / 8 + 0.01).to(dtype)
    zeros = torch.randint(-8, 8, (n, groups), dtype=torch.int8) if zero else None
    return twin.beside(Coded(codes, scale, k, group, zeros))


def forms(made: Coded) -> list[Form]:
    """One program for all tiles, more than there are tiles; few words for each thread and many."""
    words = triton.next_power_of_2(made.codes.shape[1])
    one, more = Form(True, 8, 1, max(64, words), turning=1), max(1, words // 64)
    return [
        one,
        one._replace(warps=more, block_w=64 * more, turning=2, stages=2),
        one._replace(warps=2, block_w=max(128, words), turning=99, stages=3),
    ]


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    assert got.dtype == ref.dtype
    assert got.shape == ref.shape
    return float((got.double() - ref.double()).norm() / ref.double().norm())


@pytest.mark.parametrize(
    ("group", "dtype"), [(128, BF16), (256, BF16), (1 << 20, BF16), (128, F16)], ids=str
)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_products(size: str, group: int, zero: bool, dtype: torch.dtype) -> None:
    n, k = SIZES[size]
    made, x = matrix(n, k, group, zero, dtype), torch.randn(1, k).to(dtype)
    for form in forms(made):
        assert off(w4a16.run(form, x, made), twin.linear(x, made)) < TOLERANCE[dtype]


@pytest.mark.parametrize("size", SIZES)
def test_norms_and_sums(size: str) -> None:
    n, k = SIZES[size]
    made, x = matrix(n, k, 128, zero=True), torch.randn(1, k).bfloat16()
    for form in forms(made):
        options: dict[str, Any] = {"bias": torch.randn(n).bfloat16(), "eps": 1e-3}
        options |= {"add": torch.randn(1, n).bfloat16(), "norm": torch.rand(k) + 0.5}
        ref = twin.linear(x, made, **options)
        got = w4a16.run(form, x, made, **options, out=options["add"])
        assert got is options["add"]
        assert off(got, ref) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("size", "act"), [((42, 608), "silu"), ((42, 608), "gelu_tanh"), ((64, 1024), "relu")]
)
def test_gates(size: tuple[int, int], act: str) -> None:
    """Twice the error of a product, since it is one of two; of more rows each part is rounded."""
    n, k = size
    norm = {"norm": torch.rand(k) / 16, "eps": 1e-3}
    cases: list[tuple[int, torch.dtype, dict[str, Any]]] = [
        (1, torch.float16, {}), (1, torch.bfloat16, norm), (3, torch.bfloat16, {})
    ]  # fmt: skip
    for rows, dtype, given in cases:
        made, x = matrix(n, k, 128, True, dtype), torch.randn(rows, k).to(dtype) / 32
        ref, most = twin.linear(x, made, gated=act, **given), 2 * TOLERANCE[dtype]
        assert off(w4a16.linear(x, made, gated=act, **given), ref) < most
        for form in forms(made) if rows == 1 else []:
            assert off(w4a16.run(form, x, made, gated=act, **given), ref) < most


def test_no_half_of_a_word_meets_the_scale_of_the_other() -> None:
    """Each group by itself, its scale a power of 2 of its own, its row all ones: exact."""
    k = 1024
    made = matrix(16, k, 128, zero=False)
    made = made._replace(scale=(2.0 ** torch.arange(8)).repeat(16, 1).bfloat16())
    values = twin.dequantise(made, torch.float32)
    for g in range(8):
        x = torch.zeros(1, k, dtype=torch.bfloat16)
        x[:, g * 128 : (g + 1) * 128] = 1
        for form in forms(made):
            got = w4a16.run(form, x, made)
            assert torch.equal(got, (x.float() @ values.t()).bfloat16())


def test_each_column_is_its_own() -> None:
    k = 512
    made = matrix(8, k, 128, zero=True)
    values = twin.dequantise(made, torch.float32)
    for column in [*range(0, k, 37), 15, 16, 31, 32, 127, 128, k - 1]:
        x = torch.zeros(1, k, dtype=torch.bfloat16)
        x[0, column] = 1
        for form in forms(made):
            got = w4a16.run(form, x, made)[0].float()
            torch.testing.assert_close(got, values[:, column], rtol=1e-2, atol=1e-3)


def test_nan_and_rows_apart() -> None:
    """What is not finite is so in every output; outputs beside these stay as they are."""
    made, x = matrix(21, 608, 128, zero=True), torch.randn(1, 608).bfloat16()
    wide = torch.zeros(1, 30, dtype=torch.bfloat16)
    for form in forms(made):
        w4a16.run(form, x, made, out=wide[:, :21])
        assert off(wide[:, :21], twin.linear(x, made)) < 1e-2
        assert not wide[:, 21:].any()
    x[0, 300] = torch.nan
    for form in forms(made):
        assert w4a16.run(form, x, made).isnan().all()


def test_which_rows_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Form] = []
    monkeypatch.setattr(w4a16, "run", lambda form, x, matrix, **_: taken.append(form))
    monkeypatch.setattr(w4a16, "_hopper", lambda device: True)
    bf16, half, full = torch.bfloat16, torch.float16, torch.float32
    norm = torch.ones(608)
    for dtype, given, dot in [(bf16, norm, True), (half, None, True), (half, norm, False),
                              (full, None, False)]:  # fmt: skip
        w4a16.linear(torch.ones(1, 608, dtype=dtype), matrix(21, 608, 128, True), norm=given)
        assert taken.pop().dot is dot
    for k in (64, 576, 1024, 4096, 5120, 14336, 16384):
        made = matrix(8, k, 128, zero=True)
        w4a16.linear(torch.ones(1, k, dtype=bf16), made)
        form, words = taken.pop(), made.codes.shape[1]
        assert form.dot
        assert form.turning
        assert words <= form.block_w < 2 * max(64, words)
        assert form.block_w in (64 * form.warps, 128 * form.warps)
    w4a16.linear(torch.ones(1, 20480, dtype=bf16), matrix(8, 20480, 128, zero=True))
    assert not taken.pop().turning


@triton.jit
def sums(
    words, row, out, WARPS: tl.constexpr, SETS: tl.constexpr, dtype: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    outs, warp = tl.arange(0, 8)[:, None, None, None], tl.arange(0, WARPS)[None, :, None, None]
    place, word = tl.arange(0, 4 * SETS)[None, None, :, None], tl.arange(0, 16)
    at = (outs * WARPS + warp) * (64 * SETS) + place * 16 + word[None, None, None, :]
    got = _row_dot._sums(tl.load(words + at), tl.load(row + at), SETS, dtype, ASM)
    part, outs = (
        tl.arange(0, 4)[:, None, None, None, None],
        tl.arange(0, 8)[None, :, None, None, None],
    )
    warp, span = tl.arange(0, WARPS)[:, None, None], tl.arange(0, SETS)[:, None]
    at = ((part * 8 + outs) * WARPS + warp) * SETS + span
    tl.store(out + at * 2 + tl.arange(0, 2), got)


def values(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The lower and the upper 16 bits of registers as numbers, [.., 2]."""
    pair = torch.stack([bits & 0xFFFF, bits >> 16 & 0xFFFF], -1).to(torch.int32)
    return pair.to(torch.int16).view(dtype).double()


def mma(
    a: list[torch.Tensor], b: list[torch.Tensor], c: list[torch.Tensor], dtype: torch.dtype
) -> list[torch.Tensor]:
    """`mma.m16n8k16` of what 32 lanes hold. Source: PTX ISA, matrix fragments of m16n8k16."""
    lane = torch.arange(32)
    group, thread = lane // 4, lane % 4
    left, right = torch.zeros(16, 16).double(), torch.zeros(16, 8).double()
    sums = torch.zeros(16, 8).double()
    for i in range(2):
        for r in range(4):
            left[group + 8 * (r % 2), 2 * thread + i + 8 * (r // 2)] = values(a[r], dtype)[:, i]
        for r in range(2):
            right[2 * thread + i + 8 * r, group] = values(b[r], dtype)[:, i]
            sums[group + 8 * r, 2 * thread + i] = c[2 * r + i]
    sums += left @ right
    return [sums[group + 8 * r, 2 * thread + i] for r in range(2) for i in range(2)]


def run_warp(text: str, given: list[torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The registers of 32 lanes after a set's assembly; `given`: from $32 on."""
    found: dict[str, torch.Tensor] = {f"${32 + i}": bits for i, bits in enumerate(given)}
    found["%laneid"] = torch.arange(32)

    def get(name: str) -> torch.Tensor:
        return found[name] if name in found else torch.full((32,), int(name, 0))

    for line in text.splitlines():
        name, _, rest = line.rstrip(";").partition(" ")
        to, *names = re.findall(r"[^\s,{}]+", rest) or [""]
        if name == "mov.f32":
            zero = torch.zeros(32).double()
            found[to] = zero if names[0] == "0f00000000" else found[names[0]]
        elif name in ("mov.u32", "and.b32", "shr.u32", "lop3.b32", "setp.eq.u32"):
            one, *others = map(get, names)
            if name == "lop3.b32":
                assert names[-1] == "0xEA"
                found[to] = one & others[0] | others[1]
            elif name == "mov.u32":
                found[to] = one
            else:
                how = {"and": torch.bitwise_and, "shr": torch.bitwise_right_shift, "setp": torch.eq}
                found[to] = how[name.split(".")[0]](one, others[0])
        elif name == "selp.f32":
            found[to] = torch.where(found[names[2]], found[names[0]], found[names[1]])
        elif name.startswith("mma"):
            registers = [to, *names]
            a, b, c = ([found[r] for r in registers[i:j]] for i, j in ((4, 8), (8, 10), (10, 14)))
            made = mma(a, b, c, dtype)
            found |= dict(zip(registers, made, strict=False))
        else:
            assert name in ("{", "}", ".reg")
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_assembly_multiplies_what_each_lane_holds(dtype: torch.dtype) -> None:
    """On CPU against what the interpreter makes of the same registers, on a GPU the real ones."""
    warps, sets = 2, 2
    shape = (8, warps, 4 * sets, 16)
    words = torch.randint(-(1 << 31), 1 << 31, shape).int()
    row = torch.randn(shape).to(dtype).view(torch.int16).int() & 0xFFFF
    row[1::2] <<= 16  # where fields 4 to 7 of words are
    got = torch.empty(4, 8, warps, sets, 2)
    kind = tl.bfloat16 if dtype is torch.bfloat16 else tl.float16
    sums[(1,)](words, row, got, warps, sets, kind, got.is_cuda, num_warps=warps)
    text = _row_dot._of_set(
        *(("bf16", "0x43004300"), ("f16", "0x64006400"))[dtype == torch.float16]
    )
    words, row, got = (t.cpu() for t in (words.long() & 0xFFFFFFFF, row.long() & 0xFFFFFFFF, got))
    with torch.device("cpu"):
        lane = torch.arange(32)
        for warp in range(warps):
            for s in range(sets):
                both = (t[:, warp, 4 * s : 4 * s + 4] for t in (words, row))
                held = [t[lane // 4, p, lane % 4 * 4 + w]
                        for t in both for p in range(4) for w in range(4)]  # fmt: skip
                found = run_warp(text, held, dtype)
                for half in range(2):
                    ref = torch.empty(4, 8).double()
                    ref[lane % 4, lane // 4] = found[f"${16 * half}"]
                    assert off(got[:, :, warp, s, half].double(), ref) < 1e-5
                    assert all(
                        found[f"${16 * half + i}"] is found[f"${16 * half}"] for i in range(16)
                    )
