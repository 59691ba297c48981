"""Mixture of experts: every token through the few gated MLPs that its router has chosen."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from kvrun.runtime.kernels import w4a16
from kvrun.runtime.kernels.gated import ACTIVATIONS
from kvrun.runtime.kernels.w4a16 import Coded

# What is added to the products of some rows [tokens, in] with the matrix of one expert.
More = Callable[[torch.Tensor, int], torch.Tensor]
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# Matrices [experts, out, in]; the same as codes, whose tensors have that dimension more; or what
# multiplies [tokens, in] by each of them, which the Triton kernel does not take.
Stack = torch.Tensor | Coded | Sequence[Callable[[torch.Tensor], torch.Tensor]]


def experts(
    x: torch.Tensor,
    gate_up: Stack,
    down: Stack,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    act: str,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    limit: float = 0.0,
    more: tuple[More | None, More | None] = (None, None),
) -> torch.Tensor:
    """The sum over k of weights[t, k] · mlp(x[t]) of expert chosen[t, k]: [tokens, hidden].

    x: [tokens, hidden]; gate_up: [experts, 2 * inner, hidden], the gate's rows on top; down:
    [experts, hidden, inner]; chosen: [tokens, K] int64; weights: [tokens, K] fp32. `act` is one of
    the activations of a gated MLP, or "clamped" (gpt-oss): gate · sigmoid(1.702 · gate) · (up + 1)
    with gate at most `limit` and up within ±limit. Biases: [experts, 2 * inner], [experts, hidden].
    `more` (of adapters) belongs to `gate_up` and `down`; the Triton kernel does not take it.
    """
    tokens, count = chosen.shape
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    rows = x.index_select(0, order // count)
    found = torch.empty_like(rows)
    start = 0
    for expert, size in enumerate(torch.bincount(flat).tolist()):
        if size == 0:
            continue
        mine = slice(start, start + size)
        both = _linear(rows[mine], gate_up, gate_up_bias, expert, more[0])
        gate, up = both.chunk(2, dim=1)
        found[mine] = _linear(_gated(gate, up, act, limit), down, down_bias, expert, more[1])
        start += size
    each = torch.empty_like(found).index_copy_(0, order, found).view(tokens, count, -1)
    return (each.float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _linear(
    x: torch.Tensor, stack: Stack, bias: torch.Tensor | None, expert: int, more: More | None
) -> torch.Tensor:
    y = _product(x, stack, None if bias is None else bias[expert], expert)
    return y if more is None else y + more(x, expert)


def _product(x: torch.Tensor, stack: Stack, own: torch.Tensor | None, expert: int) -> torch.Tensor:
    if isinstance(stack, Coded):
        return F.linear(x, w4a16.dequantise(one(stack, expert), x.dtype), own)
    if isinstance(stack, torch.Tensor):
        return F.linear(x, stack[expert], own)
    y = stack[expert](x)
    return y if own is None else y + own


def one(stack: Coded, expert: int) -> Coded:
    """The matrix of one expert."""
    zero = None if stack.zero is None else stack.zero[expert]
    return stack._replace(codes=stack.codes[expert], scale=stack.scale[expert], zero=zero)


def _gated(gate: torch.Tensor, up: torch.Tensor, act: str, limit: float) -> torch.Tensor:
    if act == "clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return ACTIVATIONS[act](gate) * up
