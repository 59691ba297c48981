"""Embedding: ids -> rows; Head: rows -> logits, tied to the embedding or with its own matrix."""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F

from kvrun.runtime import quant
from kvrun.runtime.checkpoint import Product, Shard
from kvrun.runtime.device import kernel
from kvrun.runtime.layers.linear import Linear, Prologue, product
from kvrun.runtime.quant import dense
from kvrun.runtime.quant._small import Small

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint

# On CPU a tied head multiplies up to 5 times as fast from a second, packed copy of the embedding.
# Up to this size the copy is cheap; a larger one would take memory that the KV cache needs more.
_COPY_BYTES = 64 << 20


class Embedding:
    """batch.ids [tokens] -> [tokens, hidden].

    `scale` is rounded to the dtype, as families train it. `more` rows stand behind those of the
    vocabulary, in a matrix named `additional_embedding`. Adapters find it by its name, unless it
    has such rows or stands for `several` modules, which they would change one by one.
    """

    def __init__(
        self,
        w: "Checkpoint",
        name: str,
        vocab: int,
        hidden: int,
        scale: float | None = None,
        more: int = 0,
        *,
        several: bool = False,
    ) -> None:
        self.name = name
        self.more = more
        self.shape, self._dtype, self._device = (vocab + more, hidden), w.dtype, w.device
        self.weight: torch.Tensor | None = w.read(f"{name}.weight", (vocab, hidden))
        self._shared: quant.TableWeight | None = None
        if more:
            added = w.read(f"{name}.additional_embedding.weight", (more, hidden))
            self.weight = torch.cat((self.weight, added))
        self._scale = None if scale is None else float(torch.tensor(scale, dtype=w.dtype))
        self.site = None if several or more else len(w.products)
        if self.site is not None:
            w.products.append(Product((Shard(name, hidden, vocab),), "embedding"))

    def share(self, head: "quant.TableWeight") -> None:
        """Look rows up in the head that is tied to this, and forget them here."""
        self._shared, self.weight = head, None

    def _rows(self, first: int, last: int) -> torch.Tensor:
        if self._shared is None:
            return cast(torch.Tensor, self.weight)[first:last]
        return self._shared.rows(torch.arange(first, last, device=self._device), self._dtype)

    def __call__(self, batch: "Batch") -> torch.Tensor:
        if self._shared is not None:
            x = self._shared.rows(batch.ids, self._dtype)
        else:
            x = F.embedding(batch.ids, cast(torch.Tensor, self.weight))
        if batch.lora is not None and batch.lora.extra is not None and self.site is not None:
            batch.lora.extra.embed(self.site, batch.ids, x, self._rows, self.shape[0])
        return x if self._scale is None else x.mul_(self._scale)


class Head:
    """x [rows, hidden] -> logits [rows, vocab], times `scale` (one, or [vocab]).

    Logits are in the dtype of x. With a `softcap` c they count as c·tanh(y / c), which is left to
    `capped`, since a kernel that draws applies it itself. `bias`: the head has one. Rows behind
    the embedding's vocabulary lie in a matrix named `additional_fc`.
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
        self.softcap = softcap
        self._kernel = kernel("softcap", w.device)
        self.vocab_size, hidden = embedding.shape
        said = w.config.get("tie_word_embeddings")
        tied = tied if said is None else w.config.flag("tie_word_embeddings")
        self.copy_bytes = 0
        self._site = len(w.products)
        self._tied_to: int | None = embedding.site
        w.products.append(Product((Shard(name, self.vocab_size, hidden),), "head"))
        if w.has(f"{name}.weight", otherwise=not tied) or said is False:
            more = embedding.more
            shards = [Shard(name, self.vocab_size - more, hidden)]
            shards += [Shard(f"{name}.additional_fc", more, hidden)] if more else []
            self._weight = quant.head(w, shards, bias)
            self._tied_to = None
        else:
            added = w.read(f"{name}.bias", (self.vocab_size,)) if bias else None
            self._weight = self._tied(w, embedding, added)

    def _tied(
        self, w: "Checkpoint", embedding: Embedding, bias: torch.Tensor | None
    ) -> quant.Weight:
        weight = cast(torch.Tensor, embedding.weight)
        if (rounded := quant.tied_head(w, weight, bias)) is not None:
            embedding.share(rounded)
            return rounded
        if bias is None and not weight.is_cuda and weight.nbytes > _COPY_BYTES:
            return dense.Plain(weight, None)
        made = dense.lay_out(weight, bias)
        if isinstance(made.rest if isinstance(made, Small) else made, dense.Packed):
            self.copy_bytes = weight.nbytes  # of a second copy of the embedding
        return made

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
            logits = product(self._weight, x, None, norm, out)
        else:
            x = x if norm is None else norm(x)
            logits = product(self._weight, x)
            known = self._weight, self._tied_to
            logits = extra.head(self._site, x, logits, batch.last_rows, *known)
        logits = logits if self._scale is None else logits.mul_(self._scale)
        return logits if extra is None or out is None else out.copy_(logits)

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocab] as they count: fp32 where there is a cap, else as they are."""
        if self.softcap is None:
            return logits
        capped: torch.Tensor = self._kernel.softcap(logits, self.softcap)
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
        self.vocab_size, self.softcap = head.vocab_size, head.softcap
        self.capped, self.copy_bytes = head.capped, head.copy_bytes

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        norm: Prologue | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._head(self._project(x, batch, before=norm), batch, None, out)
