"""Embedding: ids -> rows; Head: rows -> logits, tied to the embedding or with its own matrix."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvrun.runtime import quant
from kvrun.runtime.checkpoint import Product, Shard
from kvrun.runtime.device import kernel
from kvrun.runtime.layers.linear import Prologue, product
from kvrun.runtime.quant import dense

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint

# On CPU a tied head multiplies up to 5 times as fast from a second, packed copy of the embedding.
# Up to this size the copy is cheap; a larger one would take memory that the KV cache needs more.
_COPY_BYTES = 64 << 20


class Embedding:
    """batch.ids [tokens] -> [tokens, hidden].

    `scale` is rounded to the dtype, as families train it. Adapters find it by its name, unless it
    stands for several modules, which they would change one by one.
    """

    def __init__(
        self,
        w: "Checkpoint",
        name: str,
        vocab: int,
        hidden: int,
        scale: float | None = None,
        *,
        several: bool = False,
    ) -> None:
        self.name = name
        self.weight = w.read(f"{name}.weight", (vocab, hidden))
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=w.dtype))
        self.site = None if several else len(w.products)
        if not several:
            w.products.append(Product((Shard(name, hidden, vocab),), "embedding"))

    def __call__(self, batch: "Batch") -> torch.Tensor:
        x = F.embedding(batch.ids, self.weight)
        if batch.lora is not None and batch.lora.extra is not None and self.site is not None:
            batch.lora.extra.embed(self.site, batch.ids, x, self.weight)
        return x if self._scale is None else x.mul_(self._scale)


class Head:
    """x [rows, hidden] -> logits [rows, vocab], times `scale` (one, or [vocab]).

    `softcap` c maps them to c·tanh(y / c).

    Logits are in the dtype of x, or fp32 where they are mapped. `bias`: the head has one.
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
        self._site = len(w.products)
        self._tied_to: int | None = embedding.site
        w.products.append(Product((Shard(name, self.vocab_size, hidden),), "head"))
        if w.has(f"{name}.weight", otherwise=not tied) or said is False:
            self._weight = quant.read(w, [Shard(name, self.vocab_size, hidden)], bias)
            self._tied_to = None
        elif bias or embedding.weight.is_cuda or embedding.weight.nbytes <= _COPY_BYTES:
            more = w.read(f"{name}.bias", (self.vocab_size,)) if bias else None
            self._weight = dense.lay_out(embedding.weight, more)
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
        extra = None if batch.lora is None else batch.lora.extra
        if extra is None:
            logits = product(self._weight, x, None, norm, out if self._softcap is None else None)
        else:
            x = x if norm is None else norm(x)
            logits = product(self._weight, x)
            known = self._weight, self._tied_to
            logits = extra.head(self._site, x, logits, batch.last_rows, *known)
        if self._softcap is not None:
            capped: torch.Tensor = self._kernel.softcap(logits, self._softcap, out=out)
            return capped
        logits = logits if self._scale is None else logits.mul_(self._scale)
        return logits if extra is None or out is None else out.copy_(logits)
