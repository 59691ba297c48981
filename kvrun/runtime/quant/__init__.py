"""JOB: how a matrix is stored and multiplied.

A file of this folder is named as the checkpoint's `quant_method`, with _ for - (`dense`: plain
matrices), and has `read(w, shards, bias) -> Weight`. What they share begins with an underscore.
"""

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from kvrun import folder
from kvrun.errors import Unsupported
from kvrun.runtime.quant import _round

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard


class Weight(Protocol):
    """A matrix [out, in], with a bias or without."""

    def takes_in(self, rows: int) -> bool:
        """Whether `matmul` for so many rows knows prologues (Prologue.prologue of a norm, a gate)
        and is faster with them than behind them."""

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **prologue: Any,
    ) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out], plus the bias, plus `add` [tokens, out] if given.

        `x` must be contiguous and is not written to; `add` may be overwritten with the result,
        `out` is if given.
        """


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> Weight:
    """The matrix whose output rows are those of `shards`, one after the other.

    Raises Unsupported for a format that kvrun does not read, or not of this family.
    """
    if w.reader is not None:
        return w.reader(shards, bias)
    if w.quantize is not None:
        return _round.read(w, shards, bias)
    method = w.config.quant_method
    if method and any(shard.transposed for shard in shards):
        raise Unsupported(
            f"'{method}' of a family that stores its matrices as [in, out] is not read.",
            hint="use the model's version in 16 or 32 bits",
        )
    return cast(Weight, _format(method or "dense").read(w, shards, bias))


@cache
def _format(method: str) -> ModuleType:
    name = method.replace("-", "_")
    if name not in folder.names(__name__):
        hint = "use the model's version in 16 or 32 bits"
        if method == "gguf":
            hint = (
                "pull the repository that holds the model as safetensors, and `kvrun quantize` it"
            )
        raise Unsupported(
            f"the weights are stored as '{method}', which kvrun cannot read.", hint=hint
        )
    return folder.load(__name__, name)
