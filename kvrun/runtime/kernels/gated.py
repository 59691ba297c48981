"""The activation of a gated MLP: act(gate) · up, side by side in one matrix."""

from collections.abc import Callable

import torch
import torch.nn.functional as F


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _tanh_gelu,
    "relu": F.relu,
}


def gated(both: torch.Tensor, act: str, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """both [tokens, 2 * inner], each row a gate and then its up -> [tokens, inner].

    act(gate) is rounded to the dtype before the product, as in Hugging Face's models. `act` is one
    of ACTIVATIONS.
    """
    inner = both.shape[1] // 2
    gate, up = both[:, :inner], both[:, inner:]
    y = ACTIVATIONS[act](gate.float()).to(both.dtype) * up
    return y if out is None else out.copy_(y)
