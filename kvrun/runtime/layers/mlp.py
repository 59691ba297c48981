"""GatedMLP: act(gate(x)) · up(x), projected back; MLP: act(up(x)), projected back."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F

from kvrun.errors import Unsupported
from kvrun.runtime.device import fused
from kvrun.runtime.layers.linear import Linear, split_cols, split_rows
from kvrun.runtime.layers.norm import Norm, before_product

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint, Shard


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _square_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square_()


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "gelu_new": _tanh_gelu,
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_fast": _tanh_gelu,
    "relu": F.relu,
    "relu2": _square_relu,
    "quick_gelu": _quick_gelu,
}
# The same under the names that kernels know.
KERNEL_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation(act: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Raises Unsupported for a name that is not in ACTIVATIONS."""
    if act not in ACTIVATIONS:
        raise Unsupported(
            f"the activation '{act}' is not supported.", hint=f"known: {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[act]


class Gate:
    """[gate; up] [tokens, 2 * inner] -> act(gate) · up [tokens, inner]

    Raises Unsupported for an activation that kernels do not know either.
    """

    def __init__(self, act: str, device: torch.device) -> None:
        self._act = activation(act)
        if act not in KERNEL_NAMES:
            raise Unsupported(
                f"the activation '{act}' in a gated MLP is not supported.",
                hint=f"known: {', '.join(KERNEL_NAMES)}",
            )
        self._name = KERNEL_NAMES[act]
        self._kernel = fused("gated", device)

    def __call__(self, both: torch.Tensor) -> torch.Tensor:
        if self._kernel is not None:
            return cast(torch.Tensor, self._kernel.gated(both, self._name))
        gate, up = both.chunk(2, dim=-1)
        return self._act(gate).mul_(up)

    @property
    def prologue(self) -> dict[str, Any]:
        """How a product that takes in the gate is asked for it."""
        return {"act": self._name}

    @property
    def epilogue(self) -> dict[str, Any]:
        """How the product in front is asked for it."""
        return {"gated": self._name}


class GatedMLP:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    `gate_up` names two matrices [inner, hidden], or one [2 * inner, hidden] with the gate on top;
    `down` one [hidden, inner].
    """

    def __init__(
        self,
        w: "Checkpoint",
        gate_up: Sequence[str],
        down: str,
        *,
        hidden: int,
        inner: int,
        act: str,
        bias: bool = False,
    ) -> None:
        self._gate = Gate(act, w.device)
        self._gate_up = Linear(w, *gate_and_up(w, gate_up, hidden, inner), bias=bias)
        self._down = Linear(w, split_cols(w, down, hidden, inner), bias=bias)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        x, before = before_product(norm, x)
        if self._gate_up.gates(x, batch):
            return self._down(self._gate_up(x, batch, before=before, gate=self._gate), batch, add)
        return self._down(self._gate_up(x, batch, before=before), batch, add, before=self._gate)


def gated_mlp(w: "Checkpoint", name: str, inner: int) -> GatedMLP:
    """`name`'s gate_proj, up_proj and down_proj, with the width and activation of the model."""
    hidden, act = w.config.integer("hidden_size"), w.config.text("hidden_act", "silu")
    gate, up, down = (f"{name}.{part}_proj" for part in ("gate", "up", "down"))
    return GatedMLP(w, (gate, up), down, hidden=hidden, inner=inner, act=act)


def gated_or_plain(w: "Checkpoint", up: str, down: str, kind: str) -> "MLP | GatedMLP":
    """What T5's configurations call "relu", with matrices `up` and `down`, or "gated-gelu", where
    those of gates and ups are numbered; without biases, with the widths of the model."""
    hidden, inner = w.config.integer("hidden_size"), w.config.integer("intermediate_size")
    if not kind.startswith("gated-"):
        return MLP(w, up, down, hidden=hidden, inner=inner, act=kind, bias=False)
    act = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    return GatedMLP(w, (f"{up}_0", f"{up}_1"), down, hidden=hidden, inner=inner, act=act)


def gate_and_up(w: "Checkpoint", names: Sequence[str], hidden: int, inner: int) -> list["Shard"]:
    """This rank's rows of a gate and an up matrix, in two tensors or in one."""
    if len(names) == 2:
        return [split_rows(w, name, inner, hidden) for name in names]
    first, last = w.group.cut(inner, names[0])
    rows = ((first, last), (inner + first, inner + last))
    return [replace(split_rows(w, names[0], 2 * inner, hidden), rows=rows)]


class MLP:
    """x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first.

    `up` names a matrix [inner, hidden], `down` one [hidden, inner]; `transposed`: they are stored
    the other way round.
    """

    def __init__(
        self,
        w: "Checkpoint",
        up: str,
        down: str,
        *,
        hidden: int,
        inner: int,
        act: str,
        bias: bool = True,
        transposed: bool = False,
    ) -> None:
        self._act = activation(act)
        rows, cols = split_rows(w, up, inner, hidden), split_cols(w, down, hidden, inner)
        self._up = Linear(w, replace(rows, transposed=transposed), bias=bias)
        self._down = Linear(w, replace(cols, transposed=transposed), bias=bias)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        x, before = before_product(norm, x)
        return self._down(self._act(self._up(x, batch, before=before)), batch, add)
