"""Embedding: ids -> rows; Head: rows -> logits, tied to the embedding or with its own matrix."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvrun.runtime import quant
from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.device import kernel
from kvrun.runtime.layers.linear import Linear, Prologue, product
from kvrun.runtime.quant import dense

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint

# On CPU a tied head multiplies up to 5 times as fast from a second, packed copy of the embedding.
# Up to this size the copy is cheap; a larger one would take memory that the KV cache needs more.
_COPY_BYTES = 64 << 20


class Embedding:
    """batch.ids [tokens] -> [tokens, hidden].

    `scale` is rounded to the dtype, as families train it. `more` rows stand behind those of the
    vocabulary, in a matrix named `additional_embedding`.
    """

    def __init__(
        self,
        w: "Checkpoint",
        name: str,
        vocab: int,
        hidden: int,
        scale: float | None = None,
        more: int = 0,
    ) -> None:
        self.name = name
        self.more = more
        self.weight = w.read(f"{name}.weight", (vocab, hidden))
        if more:
            added = w.read(f"{name}.additional_embedding.weight", (more, hidden))
            self.weight = torch.cat((self.weight, added))
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=w.dtype))

    def __call__(self, batch: "Batch") -> torch.Tensor:
        x = F.embedding(batch.ids, self.weight)
        return x if self._scale is None else x.mul_(self._scale)


class Head:
    """x [rows, hidden] -> logits [rows, vocab], times `scale` (one, or [vocab]).

    `softcap` c maps them to c·tanh(y / c).

    Logits are in the dtype of x, or fp32 where they are mapped. `bias`: the head has one. Rows
    behind the embedding's vocabulary lie in a matrix named `additional_fc`.
    """

    def __init__(
        self,
        w: "Checkpoint",
        name: str,
        embedding: Embedding,
        *,
        tied: bool,
        softcap: float | None = None,
        scale: float | torch.Tensor | None = None,
        bias: bool = False,
    ) -> None:
        self._scale = scale
        self._softcap = softcap
        self._kernel = kernel("softcap", embedding.weight.device)
        self.softcapped = softcap is not None
        self.vocab_size, hidden = embedding.weight.shape
        said = w.config.get("tie_word_embeddings")
        tied = tied if said is None else w.config.flag("tie_word_embeddings")
        self.copy_bytes = 0  # of a second copy of the embedding
        if w.has(f"{name}.weight", otherwise=not tied) or said is False:
            more = embedding.more
            shards = [Shard(name, self.vocab_size - more, hidden)]
            shards += [Shard(f"{name}.additional_fc", more, hidden)] if more else []
            self._weight = quant.read(w, shards, bias)
        elif bias or embedding.weight.is_cuda or embedding.weight.nbytes <= _COPY_BYTES:
            biases = w.read(f"{name}.bias", (self.vocab_size,)) if bias else None
            self._weight = dense.lay_out(embedding.weight, biases)
            if isinstance(self._weight, dense.Packed):
                self.copy_bytes = embedding.weight.nbytes
        else:
            self._weight = dense.Plain(embedding.weight, None)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        norm: Prologue | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`norm` is applied to x first; `out` [rows, vocab], if given, gets the logits."""
        if self._softcap is None:
            logits = product(self._weight, x, before=norm, out=out)
            return logits if self._scale is None else logits.mul_(self._scale)
        logits = product(self._weight, x, before=norm)
        capped: torch.Tensor = self._kernel.softcap(logits, self._softcap, out=out)
        return capped


class Widened:
    """An embedding, projected to the width of the layers."""

    def __init__(self, embedding: Embedding, project: Linear) -> None:
        self._embedding = embedding
        self._project = project

    def __call__(self, batch: "Batch") -> torch.Tensor:
        return self._project(self._embedding(batch), batch)


class Narrowed:
    """A head behind a projection to the width of the embedding."""

    def __init__(self, head: Head, project: Linear) -> None:
        self._head = head
        self._project = project
        self.vocab_size, self.softcapped = head.vocab_size, head.softcapped
        self.copy_bytes = head.copy_bytes

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        norm: Prologue | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._head(self._project(x, batch, before=norm), batch, None, out)
