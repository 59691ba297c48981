"""Words of codes into what tensor cores multiply, one or two operations a value, for `_w4a16.dot`.

Each field of 32 neighbouring words is 32 neighbouring columns: a matrix for a product of its own
with these columns of x. So nothing moves between threads, and groups of columns are ranges of
fields, whose scale is applied to their sum. A value is an integer, exact in 16 bits.
"""

import triton
import triton.language as tl

# Two words -> each field of both, side by side in 32 bits. A code becomes the lowest bits of a
# mantissa, which needs no conversion, and what that is too much is taken off exactly.
_INT4 = """
{
.reg .b32 a, b, c, d, middle;
mov.b32 middle, MIDDLE;
shr.u32 a, $8, SHIFT;
shr.u32 b, $9, SHIFT;
lop3.b32 a, a, 0x000f000f, ONE, 0xEA;
lop3.b32 b, b, 0x000f000f, ONE, 0xEA;
prmt.b32 c, a, b, 0x5410;
prmt.b32 d, a, b, 0x7632;
sub.TYPE $LOW, c, middle;
sub.TYPE $HIGH, d, middle;
}"""
# 8 bits are one more than a mantissa of bf16 holds: the highest says how much is taken off.
_INT8_BF16 = """
{
.reg .b32 a, b;
prmt.b32 a, $4, $5, SELECT;
lop3.b32 b, a, 0x00800080, 0x43004300, 0xAE;
lop3.b32 a, a, 0x007f007f, 0x43004300, 0xEA;
sub.bf16x2 $FIELD, a, b;
}"""
_INT8_F16 = """
{
.reg .b32 a, middle;
mov.b32 middle, 0x64806480;
prmt.b32 a, $4, $5, SELECT;
lop3.b32 a, a, 0x00ff00ff, 0x64006400, 0xEA;
sub.f16x2 $FIELD, a, middle;
}"""


def _of_words(kind: str, sixteen: str) -> str:
    """The assembly for all fields of two words; `sixteen`: bf16x2 or f16x2."""
    text = ""
    if kind == "int4":
        one, middle = ("0x43004300", "0x43084308") if sixteen == "bf16x2" else (
            "0x64006400", "0x64086408",
        )  # fmt: skip
        for field in range(4):
            now = _INT4.replace("SHIFT", str(4 * field)).replace("ONE", one)
            now = now.replace("MIDDLE", middle).replace("TYPE", sixteen)
            text += now.replace("LOW", str(field)).replace("HIGH", str(field + 4))
        return text
    for field in range(4):
        select = hex(field * 0x11 | (field + 4) * 0x1100)
        form = _INT8_BF16 if sixteen == "bf16x2" else _INT8_F16
        text += form.replace("SELECT", select).replace("FIELD", str(field))
    return text


_INT4_BF16_ASM = tl.constexpr(_of_words("int4", "bf16x2"))
_INT4_F16_ASM = tl.constexpr(_of_words("int4", "f16x2"))
_INT8_BF16_ASM = tl.constexpr(_of_words("int8", "bf16x2"))
_INT8_F16_ASM = tl.constexpr(_of_words("int8", "f16x2"))


@triton.jit
def _field(words, i: tl.constexpr, KIND: tl.constexpr, dtype: tl.constexpr):
    """Field i of words, less the middle of its range."""
    if KIND == "int4":
        return ((words >> (4 * i) & 15) - 8).to(dtype)
    else:  # noqa: RET505
        return ((words >> (8 * i) & 255) - 128).to(dtype)


@triton.jit
def _fields(words, KIND: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """All fields of words [N, 32], a matrix [N, 32] each."""
    if KIND == "int4":
        if ASM and dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _INT4_BF16_ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words],
                (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                 tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
            )  # fmt: skip
        elif ASM:  # noqa: RET505
            return tl.inline_asm_elementwise(
                _INT4_F16_ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", [words],
                (tl.float16, tl.float16, tl.float16, tl.float16,
                 tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
            )  # fmt: skip
        else:
            return (
                _field(words, 0, KIND, dtype), _field(words, 1, KIND, dtype),
                _field(words, 2, KIND, dtype), _field(words, 3, KIND, dtype),
                _field(words, 4, KIND, dtype), _field(words, 5, KIND, dtype),
                _field(words, 6, KIND, dtype), _field(words, 7, KIND, dtype),
            )  # fmt: skip
    elif ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _INT8_BF16_ASM, "=r,=r,=r,=r,r,r", [words],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    elif ASM:
        return tl.inline_asm_elementwise(
            _INT8_F16_ASM, "=r,=r,=r,=r,r,r", [words],
            (tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        return (
            _field(words, 0, KIND, dtype), _field(words, 1, KIND, dtype),
            _field(words, 2, KIND, dtype), _field(words, 3, KIND, dtype),
        )  # fmt: skip


@triton.jit
def multiply_codes(
    rows, words, scale, zero, first, last,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Values · rows transposed [BLOCK_N, ROWS] over words first to last, a block per turn.

    rows: pointers [1, ROWS] to rows of x; words, scale, zero: [BLOCK_N, 1] to those of the matrix.
    """
    EVEN: tl.constexpr = WORDS * FIELDS == K
    SHARE: tl.constexpr = FIELDS // PARTS
    WHOLE: tl.constexpr = G >= K  # one scale for a row, of the whole sum
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    inner = tl.arange(0, 32)
    for j0 in tl.range(first, last, 32, num_stages=STAGES):
        values = _fields(tl.load(words + j0 + inner[None, :]), KIND, dtype, ASM)
        for p in tl.static_range(PARTS):
            if WHOLE and not ZERO:
                part = sums
            else:
                part = tl.zeros([BLOCK_N, ROWS], tl.float32)
                at = tl.minimum(j0 * FIELDS + p * SHARE * 32, K - 1) // G
                factor = tl.load(scale + at).to(tl.float32)
            if ZERO:
                whole = tl.zeros([ROWS], tl.float32)
            for f in tl.static_range(SHARE):
                k = (j0 * FIELDS + (p * SHARE + f) * 32 + inner)[:, None]
                row = tl.load(rows + k) if EVEN else tl.load(rows + k, mask=k < K, other=0.0)
                row = row.to(dtype)
                if ZERO:
                    whole += tl.sum(row.to(tl.float32), 0)
                part = tl.dot(values[p * SHARE + f], row, part, input_precision="ieee")
            if WHOLE and not ZERO:
                sums = part
            else:
                if ZERO:
                    part -= tl.load(zero + at).to(tl.float32) * whole[None, :]
                sums += part * factor
    if WHOLE and not ZERO:
        sums *= tl.load(scale).to(tl.float32)
    return sums
