"""GatedMLP: act(gate(x)) · up(x), projected back."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvrun.errors import Unsupported
from kvrun.runtime.layers.linear import Linear, split_cols, split_rows

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "relu": F.relu,
}


class GatedMLP:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given.

    `gate` and `up` name matrices [inner, hidden], `down` [hidden, inner]. Raises Unsupported for an
    activation that is not in ACTIVATIONS.
    """

    def __init__(
        self,
        w: "Checkpoint",
        gate: str,
        up: str,
        down: str,
        *,
        hidden: int,
        inner: int,
        act: str,
        bias: bool = False,
    ) -> None:
        if act not in ACTIVATIONS:
            raise Unsupported(
                f"the activation '{act}' is not supported.",
                hint=f"known: {', '.join(ACTIVATIONS)}",
            )
        self._act = ACTIVATIONS[act]
        halves = [split_rows(w, name, inner, hidden) for name in (gate, up)]
        self._inner = halves[0].shape[0]
        self._gate_up = Linear(w, *halves, bias=bias)
        self._down = Linear(w, split_cols(w, down, hidden, inner), bias=bias)

    def __call__(
        self, x: torch.Tensor, batch: "Batch", add: torch.Tensor | None = None
    ) -> torch.Tensor:
        both = self._gate_up(x)
        gate, up = both[:, : self._inner], both[:, self._inner :]
        return self._down(self._act(gate).mul_(up), add)
