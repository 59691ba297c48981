"""Layers: a model whose matrices are in memory only while their layer runs."""

import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from kvrun.errors import Unsupported
from kvrun.runtime import models, quant
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.states import StateCache
from kvrun.runtime.cache.tensors import KVCache
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.engine.start import choose_backend
from kvrun.runtime.layers.cross import CrossDecoder
from kvrun.runtime.quant import dense
from kvrun.runtime.quant._unfused import Unfused

_BLOCK = 64  # tokens of a block of the cache
_NUMBER = re.compile(r"\.(\d+)\.")


class Hessian:
    """The sum of xᵀx over the rows that a matrix has seen, and how many they were."""

    def __init__(self) -> None:
        self.rows = 0
        self.sum: torch.Tensor | None = None

    def add(self, x: torch.Tensor) -> None:
        wide = x.float()
        if self.sum is None:
            self.sum = torch.zeros((x.shape[1], x.shape[1]), device=x.device)
        self.sum.addmm_(wide.t(), wide)
        self.rows += len(x)


class Lazy(Unfused):
    """A weight that is read when it is first used; it may be watched, or given other values."""

    def __init__(self, w: Checkpoint, shards: Sequence[Shard], bias: bool) -> None:
        self.shards = shards
        self.seen: Hessian | None = None
        self._checkpoint = w
        self._bias = bias
        self._weight: quant.Weight | None = None

    @property
    def layer(self) -> int:
        """The number of its layer, -1 outside of all."""
        found = _NUMBER.search(self.shards[0].name)
        return int(found[1]) if found else -1

    def put(self, values: dict[str, torch.Tensor]) -> None:
        """Multiply by these values, by name and whole, from now on."""
        parts = []
        for shard in self.shards:
            part = values[shard.name]
            if shard.rows is not None:
                part = torch.cat([part[a:b] for a, b in shard.rows])
            parts.append(part)
        bias = self._checkpoint.vector(*self.shards) if self._bias else None
        weight = torch.cat(parts).to(self._checkpoint.dtype)
        self._weight = dense.lay_out(weight, bias)

    def drop(self) -> None:
        self._weight, self.seen = None, None

    def matmul(
        self,
        x: torch.Tensor,
        add: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        **fused: Any,
    ) -> torch.Tensor:
        if self.seen is not None:
            self.seen.add(x)
        if self._weight is None:
            self._weight = quant.read(self._checkpoint, self.shards, self._bias)
        return self._weight.matmul(x, add, out)


class Layers:
    """A model and its lazy matrices, to be run one layer after the other over some prompts."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, quantize: str | None = None
    ) -> None:
        options: Any = {"device": device, "dtype": dtype, "quantize": quantize}
        self.files = Checkpoint(folder, **options)
        self.lazy: list[Lazy] = []
        whole = Checkpoint(folder, **options)
        whole.reader = self._read
        try:
            self.model = models.compose(whole)
        except BaseException:
            self.files.close()
            raise
        finally:
            whole.close()
        if isinstance(self.model, CrossDecoder):
            self.files.close()
            raise Unsupported(
                "a model with cross-attention is not quantized into a folder.",
                hint="quantize it as it is read: --quantize of chat and serve",
            )
        self._device = device
        self._dtype = dtype

    def __enter__(self) -> "Layers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.files.close()

    def _read(self, shards: Sequence[Shard], bias: bool) -> Lazy:
        self.lazy.append(Lazy(self.files, shards, bias))
        return self.lazy[-1]

    def of(self, layer: int) -> list[Lazy]:
        return [lazy for lazy in self.lazy if lazy.layer == layer]

    def batches(self, prompts: Sequence[Sequence[int]]) -> list[Batch]:
        """A batch for each prompt; they share one cache, which holds one prompt at a time."""
        longest = max(len(prompt) for prompt in prompts)
        pages = -(-longest // _BLOCK)
        _, backend = choose_backend("auto", self.model.specs, self._device)
        cache = KVCache(self.model.specs, pages + 1, _BLOCK, self._dtype, self._device)
        place = backend(cache, self._dtype)
        states = StateCache(self.model.states, 1, self._dtype, self._device)
        slot = torch.zeros(1, dtype=torch.int64, device=self._device)
        made = []
        for prompt in prompts:
            count = len(prompt)
            places = torch.arange(count, device=self._device)
            batch = Batch(
                ids=torch.tensor(list(prompt), device=self._device),
                positions=places,
                slot_mapping=places + _BLOCK,
                block_tables=torch.arange(1, pages + 1, device=self._device).view(1, -1),
                cu_seqlens=torch.tensor([0, count], device=self._device),
                context_lens=torch.tensor([count], device=self._device),
                last_rows=places,
                query_lens_host=[count],
                context_lens_host=[count],
                block_size=_BLOCK,
                backend=place,
            )
            batch.recurrent = states.rows(slot, batch.cu_seqlens, batch.context_lens)
            place.plan(batch)
            made.append(batch)
        return made

    def embed(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        return [self.model.embed(batch) for batch in batches]

    def run(
        self, layer: int, states: Sequence[torch.Tensor], batches: Sequence[Batch]
    ) -> list[torch.Tensor]:
        """What a layer makes of every prompt's rows, which stay as they are."""
        block = self.model.blocks[layer]
        return [block(x.clone(), batch) for x, batch in zip(states, batches, strict=True)]

    def watch(self, layer: int, states: Sequence[torch.Tensor], batches: Sequence[Batch]) -> None:
        """Run a layer only for what its matrices see."""
        for lazy in self.of(layer):
            lazy.seen = Hessian()
        self.run(layer, states, batches)

    def drop(self, layer: int) -> None:
        for lazy in self.of(layer):
            lazy.drop()
