"""Decoder: ids -> logits of the rows that are wanted."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch

from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.cache.states import StateSpec
from kvrun.runtime.layers.norm import Norm, adapted, before_product, let_adapt

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.layers.embedding import Head
    from kvrun.runtime.vision import Vision


class Layer(Protocol):
    """A block of any kind."""

    @property
    def spec(self) -> AttentionSpec | StateSpec: ...

    def __call__(self, x: torch.Tensor, batch: "Batch") -> torch.Tensor:
        """x [tokens, hidden] -> the same; x may be overwritten."""


class Decoder:
    """A causal language model.

    `specs`: what each layer asks of the attention backend; `states`: what recurrent layers remember
    of a sequence. `parameter_bytes`: its weights on this
    rank. `products`: what adapters can change, by its shards. `max_position`: the context it was
    made for, in tokens, or None. `norm` None: the head has its input as it is. `softcap` c: logits
    y are raw and count as c·tanh(y / c), fp32, which `capped` makes of them. `start_id`: what an
    answer starts from where the prompt is read by an encoder (`EncoderDecoder`), else None.
    """

    start_id: int | None = None

    def __init__(
        self,
        w: "Checkpoint",
        embedding: "Callable[[Batch], torch.Tensor]",
        blocks: Sequence[Layer],
        norm: Norm | None,
        head: "Head",
    ) -> None:
        self._embedding = embedding
        self.blocks = blocks
        self._norm = norm
        self._head = head
        specs = [block.spec for block in blocks]
        self.specs = [spec for spec in specs if isinstance(spec, AttentionSpec)]
        self.states = [spec for spec in specs if isinstance(spec, StateSpec)]
        self.vocab_size = head.vocab_size
        self.softcap = head.softcap
        self.capped = head.capped
        self.parameter_bytes = w.parameter_bytes + head.copy_bytes
        let_adapt(w, (norm for block in blocks for norm in getattr(block, "norms", ())))
        let_adapt(w, [norm])
        self.products = w.products
        self.vision: Vision | None = None  # the part that sees, of a model that does
        known = w.config.get("max_position_embeddings") is not None
        self.max_position = w.config.integer("max_position_embeddings") if known else None

    def __call__(self, batch: "Batch", out: torch.Tensor | None = None) -> torch.Tensor:
        """Raw logits [S, vocab] of batch.last_rows, written to `out` if given; `plan` of the
        backend must have run. Their dtype is the model's. States that the batch asks for are put
        into it: what the last norm makes of its `state_rows`."""
        x = self.embed(batch)
        for block in self.blocks:
            x = block(x, batch)
        if batch.state_rows is not None:
            states, norm = x.index_select(0, batch.state_rows), self._norm
            norm = None if norm is None else adapted(norm, batch, batch.state_rows)
            batch.states = states if norm is None else norm(states)
        return self.logits(x, batch, out)

    def embed(self, batch: "Batch") -> torch.Tensor:
        """What the first block gets, [tokens, hidden]."""
        batch.shared.clear()
        x = self._embedding(batch)
        if batch.image_rows is not None:
            x.index_copy_(0, batch.image_rows, cast(torch.Tensor, batch.image_states))
        return x

    def logits(
        self, x: torch.Tensor, batch: "Batch", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Raw ones, from what the last block gives."""
        wanted = len(batch.last_rows)
        if wanted == 0:
            return x.new_empty((0, self.vocab_size))
        if wanted < len(x):  # else every row is wanted, in order
            x = x.index_select(0, batch.last_rows)
        norm = None if self._norm is None else adapted(self._norm, batch, batch.last_rows)
        x, before = before_product(norm, x)
        return self._head(x, batch, before, out)
