"""JOB: how a matrix is stored and multiplied.

A file of this folder is named as the checkpoint's `quant_method`, with _ for - (`dense`: plain
matrices), and has `read(w, shards, bias) -> Weight`, and `decode(w, shard)` where it stores codes;
`expert(w, shard, count, n)` where it stores experts in one tensor. What they share begins with an
underscore.
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from kvrun import folder
from kvrun.errors import Unsupported
from kvrun.runtime.kernels.moe import Stack
from kvrun.runtime.quant import _round, _stack, dense

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint, Shard


# Formats whose tools turn what a family stores as [in, out], and store it as all other matrices.
_TURNED = ("gptq", "bitsandbytes")


class Weight(Protocol):
    """A matrix [out, in], with a bias or without."""

    def takes_in(self, rows: int) -> bool:
        """Whether `matmul` for so many rows knows prologues (Prologue.prologue of a norm, a gate)
        and is faster with them than behind them."""

    def gates(self, rows: int) -> bool:
        """Whether `matmul` for so many rows knows epilogues (Gate.epilogue): of a product that is
        [gate | up] it returns act(gate) · up [tokens, out / 2]."""

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        """x [tokens, in] -> [tokens, out], plus the bias, plus `add` [tokens, out] if given.

        `x` must be contiguous and is not written to; `add` may be overwritten with the result,
        `out` is if given.
        """


class TableWeight(Weight, Protocol):
    """A weight whose rows can be looked up, too."""

    def rows(self, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Rows `ids` [n] of the matrix, as values [n, in]."""


def read(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> Weight:
    """The matrix whose output rows are those of `shards`, one after the other.

    Raises Unsupported for a format that kvrun does not read, or not of this family.
    """
    if w.reader is not None:
        return w.reader(shards, bias)
    if w.quantize is not None:
        return _round.read(w, shards, bias)
    method = w.config.quant_method
    if method not in (None, *_TURNED) and any(shard.transposed for shard in shards):
        raise Unsupported(
            f"'{method}' of a family that stores its matrices as [in, out] is not read.",
            hint="use the model's version in 16 or 32 bits",
        )
    return cast(Weight, _format(method or "dense").read(w, shards, bias))


def head(w: "Checkpoint", shards: Sequence["Shard"], bias: bool) -> Weight:
    """As `read`, the matrix that makes logits: rounding leaves it 8 bits at least."""
    if w.quantize is None or w.reader is not None:
        return read(w, shards, bias)
    added, before = w.vector(*shards) if bias else None, w.parameter_bytes
    plain = w.matrix(*shards)
    made = _round.head(w, plain, added)
    if made is None:
        return dense.lay_out(plain, added)
    w.settle(before, made[1])
    return made[0]


def tied_head(
    w: "Checkpoint", embedding: torch.Tensor, bias: torch.Tensor | None
) -> TableWeight | None:
    """The same of an embedding that makes logits too, and is to be looked up in what this gives;
    None where it stays as it is."""
    made = _round.head(w, embedding, bias)
    if made is not None:
        w.settle(w.parameter_bytes - embedding.nbytes, made[1])
        return made[0]
    return None


def experts(w: "Checkpoint", shards: Sequence[Sequence["Shard"]]) -> Stack:
    """Matrices of experts that have tensors of their own: of each the shards whose rows it has.

    Raises as `read`.
    """
    if w.reader is not None:
        return [w.reader(own, False).matmul for own in shards]
    method = w.config.quant_method
    rows, columns = sum(s.shape[0] for s in shards[0]), shards[0][0].shape[1]
    if method is None and w.quantize is None:
        whole = w.matrix(*(s for own in shards for s in own))
        return whole.view(len(shards), rows, columns)
    decode = _round.decode if method is None else _format(method).decode

    def find(n: int) -> list[Any]:
        found = [(s, decode(w, s)) for s in shards[n]]
        return [w.matrix(s) if part is None else part for s, part in found]

    return _stack.collect(w, len(shards), (rows, columns), find)


def stack(w: "Checkpoint", count: int, shard: "Shard", *, alternate: bool = False) -> Stack:
    """Matrices of experts that are one tensor, `shard.name`, whose first dimension they are.

    Each is cut as `shard`; with `alternate` its even rows come first. In a quantized model they
    may be plain. Raises Unsupported for a format that does not store experts so.
    """
    method = w.config.quant_method
    read_one = None if method is None else getattr(_format(method), "expert", None)

    def order(rows: torch.Tensor) -> torch.Tensor:
        return torch.cat((rows[::2], rows[1::2])) if alternate else rows

    if read_one is not None:

        def coded(n: int) -> list[Any]:
            found = read_one(w, shard, count, n)
            return [found._replace(codes=order(found.codes), scale=order(found.scale))]

        return _stack.collect(w, count, shard.shape, coded)
    n, k = shard.out_features, shard.in_features
    shape, cut = (n, k), (shard.rows, shard.cols)
    if shard.transposed:
        shape, cut = shape[::-1], cut[::-1]

    def one(expert: int) -> torch.Tensor:
        own = (((expert, expert + 1),), *cut)
        found = w.read(shard.name, (count, *shape), own)[0]
        return order(found.t() if shard.transposed else found)

    return made(w, shard.name, count, shard.shape, one)


def made(
    w: "Checkpoint",
    name: str,
    count: int,
    shape: tuple[int, int],
    one: Callable[[int], torch.Tensor],
) -> Stack:
    """Plain matrices of experts in the tensor `name`, each [out, in] as `one` reads it.

    Raises Unsupported where they are quantized, and where layers are looked at one by one.
    """
    method = None if _plain(w, name) else w.config.quant_method
    if method is not None or w.reader is not None:
        what = f"are stored as '{method}'" if method else "lie in one tensor"
        raise Unsupported(
            f"the experts {name} {what}, which kvrun cannot "
            f"{'read' if method else 'quantize into a folder'}.",
            hint="use the model's version in 16 or 32 bits"
            if method
            else "quantize it as it is read: --quantize of chat and serve",
        )

    def find(n: int) -> list[Any]:
        matrix = one(n)
        return [matrix if w.quantize is None else _round.coded(matrix.contiguous(), w.quantize)]

    return _stack.collect(w, count, shape, find)


def _plain(w: "Checkpoint", name: str) -> bool:
    """Whether the tensor is there and holds values: most tools know no experts in one tensor."""
    if not w.has(name, otherwise=True):
        return False
    return w.find(name, (1,), w.dtype, any_rank=True)[1].itemsize > 1


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
