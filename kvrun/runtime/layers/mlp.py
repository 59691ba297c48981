"""GatedMLP: act(gate(x)) · up(x), projected back."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from kvrun.errors import Unsupported
from kvrun.runtime.device import kernel
from kvrun.runtime.layers.linear import Linear, Prologue, split_cols, split_rows

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
# The same under the names that kernels know.
_KERNELS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class Gate:
    """[gate; up] [tokens, 2 * inner] -> act(gate) · up [tokens, inner]

    Raises Unsupported for an activation that is not in ACTIVATIONS.
    """

    def __init__(self, act: str, device: torch.device) -> None:
        if act not in ACTIVATIONS:
            raise Unsupported(
                f"the activation '{act}' is not supported.",
                hint=f"known: {', '.join(ACTIVATIONS)}",
            )
        self._act = ACTIVATIONS[act]
        self._name = _KERNELS.get(act, act)
        self._kernel = kernel("gated", device) if device.type == "cuda" else None

    def __call__(self, both: torch.Tensor) -> torch.Tensor:
        if self._kernel is not None:
            return cast(torch.Tensor, self._kernel.gated(both, self._name))
        gate, up = both.chunk(2, dim=-1)
        return self._act(gate).mul_(up)

    @property
    def prologue(self) -> dict[str, Any]:
        """How a product that takes in the gate is asked for it."""
        return {"act": self._name}


class GatedMLP:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    `gate` and `up` name matrices [inner, hidden], `down` [hidden, inner].
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
        self._gate = Gate(act, w.device)
        halves = [split_rows(w, name, inner, hidden) for name in (gate, up)]
        self._gate_up = Linear(w, *halves, bias=bias)
        self._down = Linear(w, split_cols(w, down, hidden, inner), bias=bias)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Prologue | None = None,
    ) -> torch.Tensor:
        return self._down(self._gate_up(x, batch, before=norm), batch, add, before=self._gate)
