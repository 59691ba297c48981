"""Products of few rows with a large matrix: the twin of `triton/skinny.py`, in plain torch.

A step that decodes for one reader multiplies one row by every weight of the model: what counts is
to read the weights at the memory's speed, and not to stop between one product and the next. So
what happens to the row before the product, and the sum after it, belong to the product.
"""

import torch
import torch.nn.functional as F


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    add: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str | None = None,
    gated: str | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [M, K] · weight [N, K] transposed + bias [N] + add [M, N] -> [M, N] in x's dtype.

    `norm` [K] fp32: the row enters as x / sqrt(mean(x²) + eps) · norm. `act` ("silu", "gelu",
    "gelu_tanh", "relu"): x is [M, 2K] = [gate | up] and the row enters as act(gate) · up. Either
    or neither of the two. `gated`, of the same names: what comes out is [gate | up] and becomes
    act(gate) · up [M, N / 2]; then there is no bias and no `add`. What enters is rounded to x's
    dtype, sums are in fp32, and the result is rounded once. `out` may be `add` itself. Columns of
    all matrices are contiguous, rows may be apart; `weight`, `bias` and `add` have x's dtype.
    """
    assert norm is None or act is None
    row = x.float()
    if norm is not None:
        row = row * torch.rsqrt(row.square().mean(-1, keepdim=True) + eps) * norm
    if act is not None:
        gate, up = row.chunk(2, -1)
        row = activate(gate, act) * up
    y = row.to(x.dtype).float() @ weight.float().t()
    if gated is not None:
        gate, up = y.chunk(2, -1)
        y = activate(gate, gated) * up
    for term in (bias, add):
        if term is not None:
            y = y + term.float()
    return y.to(x.dtype) if out is None else out.copy_(y)


def takes_in(m: int, dtype: torch.dtype) -> bool:
    """Whether `linear` with `norm` or `act` is faster for m rows than torch's own product behind
    them: never, of the twin."""
    return False


def serves(m: int, weight: torch.Tensor) -> bool:
    """Whether `linear` is faster for m rows than torch's own product: never, of the twin."""
    return False


def activate(gate: torch.Tensor, act: str) -> torch.Tensor:
    if act == "silu":
        return F.silu(gate)
    if act == "relu":
        return F.relu(gate)
    return F.gelu(gate, approximate={"gelu": "none", "gelu_tanh": "tanh"}[act])
