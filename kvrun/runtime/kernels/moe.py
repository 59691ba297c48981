"""Mixture of experts: every token through the few gated MLPs that its router has chosen."""

from collections.abc import Callable

import torch

from kvrun.runtime.kernels.gated import ACTIVATIONS

Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    act: str,
    *,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    limit: float = 0.0,
) -> torch.Tensor:
    """The sum over k of weights[t, k] · mlp(x[t]) of expert chosen[t, k]: [tokens, hidden].

    x: [tokens, hidden]; gate_up: [experts, 2 * inner, hidden], the gate's rows on top; down:
    [experts, hidden, inner]; chosen: [tokens, K] int64; weights: [tokens, K] fp32. `act` is one of
    the activations of a gated MLP, or "clamped" (gpt-oss): gate · sigmoid(1.702 · gate) · (up + 1)
    with gate at most `limit` and up within ±limit. Biases: [experts, 2 * inner], [experts, hidden].
    """
    tokens, count = chosen.shape
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    rows = x.index_select(0, order // count)
    found = torch.empty_like(rows)
    start = 0
    for expert, size in enumerate(torch.bincount(flat, minlength=len(gate_up)).tolist()):
        if size == 0:
            continue
        mine = slice(start, start + size)
        both = _linear(rows[mine], gate_up, gate_up_bias, expert)
        gate, up = both.chunk(2, dim=1)
        found[mine] = _linear(_gated(gate, up, act, limit), down, down_bias, expert)
        start += size
    each = torch.empty_like(found).index_copy_(0, order, found).view(tokens, count, -1)
    return (each.float() * weights.unsqueeze(-1)).sum(1).to(x.dtype)


def _linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, expert: int
) -> torch.Tensor:
    return torch.nn.functional.linear(x, weight[expert], None if bias is None else bias[expert])


def _gated(gate: torch.Tensor, up: torch.Tensor, act: str, limit: float) -> torch.Tensor:
    if act == "clamped":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return ACTIVATIONS[act](gate) * up
