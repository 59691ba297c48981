"""Foreign: a model of transformers in the place of a Decoder."""

import inspect
from typing import Any

import torch

from kvrun.errors import Unsupported
from kvrun.runtime.batch import Batch
from kvrun.runtime.checkpoint import Checkpoint
from kvrun.runtime.fallback.interface import Call, Pass, running
from kvrun.runtime.layers.decoder import Decoder


class _Head:
    """What a Decoder asks of its head, where transformers' class has its own."""

    copy_bytes = 0
    softcap = None  # transformers' classes apply theirs

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    @staticmethod
    def capped(logits: torch.Tensor) -> torch.Tensor:
        return logits


class Foreign(Decoder):
    """A model of transformers in the place of a Decoder. Adapters cannot change it."""

    def __init__(
        self, w: Checkpoint, model: Any, calls: list[Call], vocab_size: int, limit: int | None
    ) -> None:
        super().__init__(w, self._ids, [], None, _Head(vocab_size))  # type: ignore[arg-type]
        self._model, self._calls = model, calls
        self.specs = [call.spec for call in calls]
        self._picks = "logits_to_keep" in inspect.signature(model.forward).parameters
        tensors = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
        self.parameter_bytes = sum(tensors.values())
        if limit is not None:
            self.max_position = limit

    @staticmethod
    def _ids(batch: Batch) -> torch.Tensor:
        return batch.ids

    def __call__(self, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        options: dict[str, Any] = {}
        if self._picks:
            options["logits_to_keep"] = batch.last_rows
        if batch.state_rows is not None:
            options["output_hidden_states"] = True
        step = Pass(self._calls, batch)
        before = running.set(step)
        try:
            found = self._model(
                input_ids=batch.ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                **options,
            )
        finally:
            running.reset(before)
        if step.done != len(self._calls):
            raise Unsupported("layers are not called in the order in which they were at first")
        if batch.state_rows is not None:
            batch.states = found.hidden_states[-1][0].index_select(0, batch.state_rows)
        logits: torch.Tensor = found.logits[0]
        if not self._picks:
            logits = logits.index_select(0, batch.last_rows)
        return logits if out is None else out.copy_(logits)
