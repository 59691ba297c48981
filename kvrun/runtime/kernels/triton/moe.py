"""Mixture of experts in Triton: two products, each over tiles of tokens that chose one expert.

Which tokens chose which expert is known to the device alone, and a captured step must not ask: the
grid has room for the worst case, and each program finds its tile from the sorted choices. A few
tokens are not sorted: each choice is a tile by itself. Codes become values in registers, as in
`w4a16.py`.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from kvrun.runtime.kernels.triton import w4a16
from kvrun.runtime.kernels.triton._softmax import INTERPRETED, product
from kvrun.runtime.kernels.triton._w4a16 import _multiply
from kvrun.runtime.kernels.triton.gated import _act
from kvrun.runtime.kernels.w4a16 import Coded

# Up to this many choices in a step, each has a tile of its own: hardly any two share an expert.
_ALONE = 16


def experts(
    x: torch.Tensor,
    gate_up: torch.Tensor | Coded,
    down: torch.Tensor | Coded,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    act: str,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    limit: float = 0.0,
) -> torch.Tensor:
    """As the twin, of stacks."""
    tokens, count = chosen.shape
    total, hidden, inner = _shape(down)
    pairs = tokens * count
    rows = 16 if pairs <= 16 * total else 64
    flat = chosen.reshape(-1)
    if pairs <= _ALONE:
        order, ends, tiles = flat, flat, pairs
    else:
        ascending, order = flat.sort(stable=True)
        numbers = torch.arange(total, device=x.device)
        ends = torch.searchsorted(ascending, numbers, right=True)
        tiles = min(pairs, total) + pairs // rows
    between = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
    each = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    shape = {
        "COUNT": count, "EXPERTS": total, "SLOTS": triton.next_power_of_2(total), "ROWS": rows,
        "ALONE": pairs <= _ALONE, "num_warps": 4, "num_stages": 3 if x.itemsize < 4 else 1,
    }  # fmt: skip
    wide = 64 if x.itemsize < 4 else 32
    _up[(tiles, triton.cdiv(inner, wide))](
        x, *_stored(gate_up), gate_up_bias, between, order, ends, pairs, x.stride(0), limit,
        HIDDEN=hidden, INNER=inner, COLUMNS=wide, DEPTH=wide, ACT=act, **shape, **_form(gate_up),
    )  # fmt: skip
    _down[(tiles, triton.cdiv(hidden, wide))](
        between, *_stored(down), down_bias, weights, each, order, ends, pairs,
        HIDDEN=hidden, INNER=inner, COLUMNS=wide, DEPTH=wide, **shape, **_form(down),
    )  # fmt: skip
    return each.view(tokens, count, hidden).sum(1)


def _shape(stack: torch.Tensor | Coded) -> tuple[int, int, int]:
    count, rows, columns = (stack.codes if isinstance(stack, Coded) else stack).shape
    return count, rows, stack.columns if isinstance(stack, Coded) else columns


def _stored(stack: torch.Tensor | Coded) -> tuple[torch.Tensor | None, ...]:
    if isinstance(stack, Coded):
        return w4a16._words(stack), stack.scale, stack.zero, stack.table
    return stack, None, None, None


def _form(stack: torch.Tensor | Coded) -> dict[str, Any]:
    """How a stack lies in memory; K is 0 of plain values."""
    if not isinstance(stack, Coded):
        return {"K": 0, "G": 1, "WORDS": 0, "FIELDS": 1, "KIND": "plain",
                "ZERO": False, "GROUPS": 1}  # fmt: skip
    return {**w4a16._options(stack), "GROUPS": stack.scale.shape[-1]}


@triton.jit
def _tile(
    order_at, ends_at, pairs, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    ALONE: tl.constexpr,
):  # fmt: skip
    """The expert of this program's tile (EXPERTS when there is none), and its choices: [ROWS]
    numbers of pairs, and which of them are real."""
    tile, lanes = tl.program_id(0), tl.arange(0, ROWS)
    if ALONE:
        expert = tl.load(order_at + tile).to(tl.int32)
        found = tile + lanes * 0
        real = lanes == 0
    else:
        numbers = tl.arange(0, SLOTS)
        there = numbers < EXPERTS
        ends = tl.load(ends_at + numbers, mask=there, other=0).to(tl.int32)
        first = tl.load(ends_at + numbers - 1, mask=there & (numbers > 0), other=0).to(tl.int32)
        tiles = tl.where(there, tl.cdiv(ends - first, ROWS), 0)
        until = tl.cumsum(tiles, 0)
        expert = tl.sum((until <= tile).to(tl.int32) * there.to(tl.int32), 0)
        mine = numbers == expert
        begin = tl.sum(tl.where(mine, first + (tile - (until - tiles)) * ROWS, 0), 0)
        end = tl.sum(tl.where(mine, ends, 0), 0)
        places = begin + lanes
        real = places < end
        found = tl.load(order_at + places, mask=real, other=0).to(tl.int32)
    return expert, found, real


@triton.jit
def _coded(
    x_at, words_at, scale_at, zero_at, table, own,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [ROWS, K] at `x_at` times rows `own` [COLUMNS] of a stack of codes: [ROWS, COLUMNS]."""
    dtype: tl.constexpr = tl.float32 if INTERPRETED else x_at.dtype.element_ty
    rows = own[:, None]
    y = _multiply(
        x_at[None, :], words_at + rows * WORDS, scale_at + rows * GROUPS,
        zero_at + rows * GROUPS if ZERO else zero_at, table, 0, WORDS,
        K, G, WORDS, FIELDS, KIND, ZERO, ROWS, COLUMNS, 3, dtype,
    )  # fmt: skip
    return tl.trans(y)


@triton.jit(do_not_specialize=["pairs", "limit"])
def _up(
    x_at, weight_at, scale_at, zero_at, table_at, bias_at, out_at, order_at, ends_at,
    pairs, x_stride, limit,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    ACT: tl.constexpr, COUNT: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr,
    ROWS: tl.constexpr, ALONE: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """act(gate) · up of a tile of choices, for COLUMNS of the inner width."""
    expert, pair, real = _tile(order_at, ends_at, pairs, EXPERTS, SLOTS, ROWS, ALONE)
    if expert >= EXPERTS:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < INNER
    rows_at = x_at + (pair // COUNT).to(tl.int64) * x_stride
    if KIND == "plain":
        depth = tl.arange(0, DEPTH)
        rows_at = rows_at[:, None] + depth[None, :]
        weight_at += expert.to(tl.int64) * 2 * INNER * HIDDEN
        gate_at = weight_at + columns.to(tl.int64)[None, :] * HIDDEN + depth[:, None]
        gate = tl.zeros([ROWS, COLUMNS], tl.float32)
        up = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, HIDDEN, DEPTH):
            left = depth < HIDDEN - start
            x = tl.load(rows_at + start, mask=real[:, None] & left[None, :], other=0.0)
            mask = left[:, None] & inside[None, :]
            gate = product(x, tl.load(gate_at + start, mask=mask, other=0.0), gate)
            up = product(x, tl.load(gate_at + INNER * HIDDEN + start, mask=mask, other=0.0), up)
    else:
        own = expert.to(tl.int64) * 2 * INNER + tl.minimum(columns, INNER - 1)
        gate = _coded(
            rows_at, weight_at, scale_at, zero_at, table_at, own,
            K, G, WORDS, FIELDS, KIND, ZERO, GROUPS, ROWS, COLUMNS,
        )  # fmt: skip
        up = _coded(
            rows_at, weight_at, scale_at, zero_at, table_at, own + INNER,
            K, G, WORDS, FIELDS, KIND, ZERO, GROUPS, ROWS, COLUMNS,
        )  # fmt: skip
    if bias_at is not None:
        bias_at += expert * 2 * INNER + columns
        gate += tl.load(bias_at, mask=inside, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias_at + INNER, mask=inside, other=0.0).to(tl.float32)[None, :]
    if ACT == "clamped":
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        y = gate * tl.sigmoid(1.702 * gate) * (up + 1.0)
    else:
        y = _act(gate, ACT) * up
    places = out_at + pair.to(tl.int64)[:, None] * INNER + columns[None, :]
    tl.store(places, y.to(out_at.dtype.element_ty), mask=real[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["pairs"])
def _down(
    x_at, weight_at, scale_at, zero_at, table_at, bias_at, weights_at, out_at,
    order_at, ends_at, pairs,
    HIDDEN: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    COUNT: tl.constexpr, EXPERTS: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
    ALONE: tl.constexpr,
    K: tl.constexpr, G: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr,
    KIND: tl.constexpr, ZERO: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """A tile of choices back to COLUMNS of the hidden width, times the router's weights."""
    expert, pair, real = _tile(order_at, ends_at, pairs, EXPERTS, SLOTS, ROWS, ALONE)
    if expert >= EXPERTS:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < HIDDEN
    rows_at = x_at + pair.to(tl.int64) * INNER
    if KIND == "plain":
        depth = tl.arange(0, DEPTH)
        rows_at = rows_at[:, None] + depth[None, :]
        weight_at += expert.to(tl.int64) * HIDDEN * INNER
        column_at = weight_at + columns.to(tl.int64)[None, :] * INNER + depth[:, None]
        y = tl.zeros([ROWS, COLUMNS], tl.float32)
        for start in range(0, INNER, DEPTH):
            left = depth < INNER - start
            x = tl.load(rows_at + start, mask=real[:, None] & left[None, :], other=0.0)
            mask = left[:, None] & inside[None, :]
            y = product(x, tl.load(column_at + start, mask=mask, other=0.0), y)
    else:
        own = expert.to(tl.int64) * HIDDEN + tl.minimum(columns, HIDDEN - 1)
        y = _coded(
            rows_at, weight_at, scale_at, zero_at, table_at, own,
            K, G, WORDS, FIELDS, KIND, ZERO, GROUPS, ROWS, COLUMNS,
        )  # fmt: skip
    if bias_at is not None:
        bias = tl.load(bias_at + expert * HIDDEN + columns, mask=inside, other=0.0)
        y += bias.to(tl.float32)[None, :]
    y *= tl.load(weights_at + pair, mask=real, other=0.0)[:, None]
    places = out_at + pair.to(tl.int64)[:, None] * HIDDEN + columns[None, :]
    tl.store(places, y.to(out_at.dtype.element_ty), mask=real[:, None] & inside[None, :])
