"""Words of codes into what tensor cores multiply, one or two operations a value, for `_w4a16.dot`.

Each field of 32 neighbouring words is 32 neighbouring columns: a matrix for a product of its own
with these columns of x, or one beside the others in a product of all. So nothing moves between
threads, and groups of columns are ranges of fields, whose scale is applied to their sum, or to
their values. A value before it is scaled is an integer, exact in 16 bits, unless zeros are no
integers.
"""

import triton
import triton.language as tl

# Two words -> each field of both, side by side in 32 bits. A code becomes the lowest bits of a
# mantissa, which needs no conversion, and what that is too much, with the zero of fields 0 to 3 and
# of 4 to 7, is taken off exactly.
_INT4 = """
{
.reg .b32 a, b, c, d;
shr.u32 a, $8, SHIFT;
shr.u32 b, $9, SHIFT;
lop3.b32 a, a, 0x000f000f, ONE, 0xEA;
lop3.b32 b, b, 0x000f000f, ONE, 0xEA;
prmt.b32 c, a, b, 0x5410;
prmt.b32 d, a, b, 0x7632;
sub.TYPE $LOW, c, $10;
sub.TYPE $HIGH, d, $11;
}"""
# And then times the scales of both halves, rounded.
_INT4_SCALED = (
    _INT4[:-1]
    + """
mul.TYPE $LOW, $LOW, $12;
mul.TYPE $HIGH, $HIGH, $13;
}"""
)
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
    if kind.startswith("int4"):
        one = "0x43004300" if sixteen == "bf16x2" else "0x64006400"
        for field in range(4):
            now = (
                (_INT4 if kind == "int4" else _INT4_SCALED)
                .replace("SHIFT", str(4 * field))
                .replace("ONE", one)
            )
            now = now.replace("TYPE", sixteen)
            text += now.replace("LOW", str(field)).replace("HIGH", str(field + 4))
        return text
    for field in range(4):
        select = hex(field * 0x11 | (field + 4) * 0x1100)
        form = _INT8_BF16 if sixteen == "bf16x2" else _INT8_F16
        text += form.replace("SELECT", select).replace("FIELD", str(field))
    return text


_INT4_BF16_ASM = tl.constexpr(_of_words("int4", "bf16x2"))
_INT4_F16_ASM = tl.constexpr(_of_words("int4", "f16x2"))
_SCALED_BF16_ASM = tl.constexpr(_of_words("int4 scaled", "bf16x2"))
_SCALED_F16_ASM = tl.constexpr(_of_words("int4 scaled", "f16x2"))
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
def _fields(words, low, high, KIND: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """All fields of words [N, 32], a matrix [N, 32] each; of 4 bits less zeros `low`, `high` [N, 1]
    of the first and the second half of the fields."""
    if KIND == "int4":
        if ASM and dtype == tl.bfloat16:
            return tl.inline_asm_elementwise(
                _INT4_BF16_ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r",
                [words, (low + (128.0 + 8.0)).to(dtype), (high + (128.0 + 8.0)).to(dtype)],
                (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
                 tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
            )  # fmt: skip
        elif ASM:  # noqa: RET505
            return tl.inline_asm_elementwise(
                _INT4_F16_ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r",
                [words, (low + (1024.0 + 8.0)).to(dtype), (high + (1024.0 + 8.0)).to(dtype)],
                (tl.float16, tl.float16, tl.float16, tl.float16,
                 tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
            )  # fmt: skip
        else:
            return (
                _field(words, 0, KIND, dtype) - low.to(dtype),
                _field(words, 1, KIND, dtype) - low.to(dtype),
                _field(words, 2, KIND, dtype) - low.to(dtype),
                _field(words, 3, KIND, dtype) - low.to(dtype),
                _field(words, 4, KIND, dtype) - high.to(dtype),
                _field(words, 5, KIND, dtype) - high.to(dtype),
                _field(words, 6, KIND, dtype) - high.to(dtype),
                _field(words, 7, KIND, dtype) - high.to(dtype),
            )
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
def _scaled(words, low, high, of_low, of_high, dtype: tl.constexpr, ASM: tl.constexpr):
    """As `_fields` of 4 bits, times scales [N, 1] of both halves: values, rounded to `dtype`."""
    if ASM and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _SCALED_BF16_ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r",
            [words, (low + (128.0 + 8.0)).to(dtype), (high + (128.0 + 8.0)).to(dtype),
             of_low.to(dtype), of_high.to(dtype)],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16,
             tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), True, 2,
        )  # fmt: skip
    elif ASM:  # noqa: RET505
        return tl.inline_asm_elementwise(
            _SCALED_F16_ASM, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r",
            [words, (low + (1024.0 + 8.0)).to(dtype), (high + (1024.0 + 8.0)).to(dtype),
             of_low.to(dtype), of_high.to(dtype)],
            (tl.float16, tl.float16, tl.float16, tl.float16,
             tl.float16, tl.float16, tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    else:
        a, b, c, d, e, f, g, h = _fields(words, low, high, "int4", tl.float32, ASM)
        return (
            (a * of_low).to(dtype), (b * of_low).to(dtype), (c * of_low).to(dtype),
            (d * of_low).to(dtype), (e * of_high).to(dtype), (f * of_high).to(dtype),
            (g * of_high).to(dtype), (h * of_high).to(dtype),
        )  # fmt: skip


@triton.jit
def _together(values, FIELDS: tl.constexpr):
    """FIELDS matrices [N, 32] side by side."""
    if FIELDS == 8:
        a, b, c, d, e, f, g, h = values
        even, odd = tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h))
        whole = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 1))
    else:
        a, b, c, d = values
        whole = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(whole, [whole.shape[0], 32 * FIELDS])


@triton.jit
def _add_all(
    sums, values, rows, j0,
    K: tl.constexpr, FIELDS: tl.constexpr, EVEN: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """sums + all fields of 32 words from j0 on, in one product with their columns of x."""
    k = (j0 * FIELDS + tl.arange(0, 32 * FIELDS))[:, None]
    row = tl.load(rows + k) if EVEN else tl.load(rows + k, mask=k < K, other=0.0)
    return tl.dot(_together(values, FIELDS), row.to(dtype), sums, input_precision="ieee")


@triton.jit
def _less(values, offset, ASM: tl.constexpr):
    """values - offset, two at a time where there is an instruction for that."""
    if ASM and values.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "sub.bf16x2 $0, $1, $2;", "=r,r,r", [values, offset], tl.bfloat16, True, 2
        )
    elif ASM:  # noqa: RET505
        return tl.inline_asm_elementwise(
            "sub.f16x2 $0, $1, $2;", "=r,r,r", [values, offset], tl.float16, True, 2
        )
    else:
        return values - offset


@triton.jit
def halves(both, dtype: tl.constexpr):
    """The lower and the upper 16 bits of words, each a value of `dtype`, in fp32."""
    low = both.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return low, (both >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def grid(scale, zero, at, there, ZERO: tl.constexpr, ONCE: tl.constexpr):
    """Scale and zero of groups `at` in fp32. ZERO: 0, there is none; 1, it lies where `zero` says;
    2, a small integer behind its scale in 16 bits, where ONCE loads both in one go."""
    if ZERO == 2 and ONCE:
        both = tl.load(scale.to(tl.pointer_type(tl.int32)) + at, mask=there, other=0)
        return halves(both, scale.dtype.element_ty)
    if ZERO == 2:
        at *= 2
    factor = tl.load(scale + at, mask=there, other=0.0).to(tl.float32)
    if ZERO:
        return factor, tl.load(zero + at, mask=there, other=0.0).to(tl.float32)
    else:  # noqa: RET505
        return factor, 0.0


@triton.jit
def multiply_codes(
    rows, words, scale, zero, first, last,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    PARTS: tl.constexpr, KIND: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, JOINED: tl.constexpr, ASM: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Values · rows transposed [BLOCK_N, ROWS] over words first to last, a block per turn.

    rows: pointers [1, ROWS] to rows of x; words: [BLOCK_N, 1] to those of the matrix; scale, zero:
    [BLOCK_N], of one dimension so that a thread loads what several of its values share once.
    JOINED: all fields are one product, of codes with one scale for a row and no zeros.
    """
    EVEN: tl.constexpr = WORDS * FIELDS == K
    SHARE: tl.constexpr = FIELDS // PARTS
    WHOLE: tl.constexpr = G >= K  # one scale for a row, of the whole sum
    # Whether zeros are taken off with the middle of a code's range, at no cost.
    INSIDE: tl.constexpr = KIND == "int4" and ZERO == 2 and PARTS <= 2
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    none = tl.zeros([BLOCK_N], tl.float32)
    inner = tl.arange(0, 32)
    for j0 in tl.range(first, last, 32, num_stages=STAGES):
        low, high = none, none
        if INSIDE:
            at = j0 * FIELDS // G
            _, low = grid(scale, zero, at, True, ZERO, False)
            at = tl.minimum(j0 * FIELDS + SHARE * 32 * (PARTS - 1), K - 1) // G
            _, high = grid(scale, zero, at, True, ZERO, False)
        tile = tl.load(words + j0 + inner[None, :])
        values = _fields(tile, low[:, None], high[:, None], KIND, dtype, ASM)
        if JOINED:
            sums = _add_all(sums, values, rows, j0, K, FIELDS, EVEN, dtype)
        for p in tl.static_range(0 if JOINED else PARTS):
            if WHOLE and not ZERO:
                part = sums
            else:
                part = tl.zeros([BLOCK_N, ROWS], tl.float32)
                at = tl.minimum(j0 * FIELDS + p * SHARE * 32, K - 1) // G
                factor, offset = grid(scale, zero, at, True, ZERO, False)
            for f in tl.static_range(SHARE):
                k = (j0 * FIELDS + (p * SHARE + f) * 32 + inner)[:, None]
                row = tl.load(rows + k) if EVEN else tl.load(rows + k, mask=k < K, other=0.0)
                value = values[p * SHARE + f]
                if ZERO and not INSIDE:
                    value = _less(value, offset.to(dtype)[:, None], ASM)
                part = tl.dot(value, row.to(dtype), part, input_precision="ieee")
            if WHOLE and not ZERO:
                sums = part
            else:
                sums += part * factor[:, None]
    if WHOLE and not ZERO:
        sums *= tl.load(scale).to(tl.float32)[:, None]
    return sums


@triton.jit
def multiply_scaled(
    rows, words, scale, zero, first, last,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """`multiply_codes` of 4 bits where each half of a word's fields is of one group, with a zero
    beside its scale or none: values are scaled, and rounded, and not the sums of groups. So all
    fields of 32 words are one product, which tensor cores begin while values are made."""
    EVEN: tl.constexpr = WORDS * 8 == K
    sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
    none = tl.zeros([BLOCK_N], tl.float32)
    for j0 in tl.range(first, last, 32, num_stages=STAGES):
        of_low, low = grid(scale, zero, j0 * 8 // G, True, ZERO, False)
        at = tl.minimum(j0 * 8 + 128, K - 1) // G
        of_high, high = grid(scale, zero, at, True, ZERO, False)
        if not ZERO:
            low, high = none, none
        tile = tl.load(words + j0 + tl.arange(0, 32)[None, :])
        values = _scaled(
            tile, low[:, None], high[:, None], of_low[:, None], of_high[:, None], dtype, ASM
        )
        sums = _add_all(sums, values, rows, j0, K, 8, EVEN, dtype)
    return sums
