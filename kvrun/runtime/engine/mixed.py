"""MixedGraphs: small steps of prompts, chunks and single tokens, captured by their size.

A short prompt takes the device less time than the host needs to launch its kernels one by one.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from kvrun.runtime.attention import Backend
from kvrun.runtime.batch import Batch
from kvrun.runtime.device import kernel
from kvrun.runtime.engine.graphs import Capture, Replay
from kvrun.runtime.engine.slots import Slots
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.lora.resident import Resident
from kvrun.runtime.lora.rows import Assigned, Captured

SIZES = (32, 64, 128, 256, 512)  # tokens
ROWS = 16  # sequences at most; fewer than tokens, so that wanted rows are picked out


class Columns(NamedTuple):
    """A step on the host: T tokens of B sequences, of which S draw."""

    ids: list[int]  # [T]; 0 where only the device knows
    positions: np.ndarray  # [T]
    places: np.ndarray  # [T] rows of the cache
    slots: list[int]  # [B]
    ends: list[int]  # [B + 1], the first is 0
    lengths: list[int]  # [B]
    last_rows: list[int]  # rows whose logits are wanted; [S] where no prompt is scored
    drawn_at: list[int]  # [S] the place of the drawn token in its sequence
    drawing: list[int]  # [S] slots
    unknown: list[int]  # rows whose ids only the device knows
    unknown_slots: list[int]
    scoring: list[int]  # which of the wanted logits tell how likely a prompt's tokens were,
    targets: list[int]  # which tokens,
    drawn_rows: list[int]  # and which of them draw; all three empty where no prompt is scored


class MixedGraphs:
    """One step of up to 512 tokens of up to 16 sequences: embed, layers, draw, append; steps with
    adapters have graphs of their own.

    `ids`, `finite` [16] and raw `logits` [16, vocab] hold what the last replay has made, `drawn_at`
    [16] the places of its tokens.
    """

    def __init__(
        self,
        model: Decoder,
        backend: Backend,
        slots: Slots,
        *,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture,
        resident: Resident,
    ) -> None:
        self._model = model
        self._backend = backend
        self._slots = slots
        self._block_size = block_size
        self._draw_kernel = kernel("draw", device)
        self._buffer = torch.zeros(3 * SIZES[-1] + 6 * ROWS + 1, dtype=torch.int64, device=device)
        self.ids = torch.zeros(ROWS, dtype=torch.int64, device=device)
        self.finite = torch.zeros(ROWS, dtype=torch.bool, device=device)
        self.logits = torch.zeros((ROWS, model.vocab_size), dtype=dtype, device=device)
        self.drawn_at = self._parts(SIZES[-1])[7]
        self._lora = Captured(resident, SIZES[-1], ROWS)
        self._capture = capture
        self._adapted: dict[int, Replay] = {}
        self._fill(_nothing(), SIZES[-1])
        self._replays = {
            size: capture(lambda size=size: self._run(size))  # type: ignore[misc]
            for size in reversed(SIZES)
        }

    def takes(self, tokens: int, rows: int) -> bool:
        """Whether there is a graph for such a step."""
        return tokens <= SIZES[-1] and rows <= ROWS

    def replay(self, columns: Columns, adapters: Assigned | None = None) -> None:
        """Run a step that `takes` says yes to; `adapters` are those of its sequences."""
        size = next(size for size in SIZES if size >= len(columns.ids))
        replays = self._replays if adapters is None else self._adapted
        if size not in replays:
            self._fill(_nothing(), size)
            self._lora.clear()
            replays[size] = self._capture(lambda: self._run(size, adapted=True))
        if adapters is not None:
            counts = np.diff(columns.ends)
            self._lora.show(np.repeat(adapters.slots, counts), self._slots.send)
        self._fill(columns, size)
        if columns.unknown:
            rows, slots = self._slots.send(columns.unknown, columns.unknown_slots)
            self._parts(size)[0].index_copy_(0, rows, self._slots.state.last.index_select(0, slots))
        replays[size]()

    def _sizes(self, size: int) -> list[int]:
        return [size, size, size, ROWS, ROWS + 1, ROWS, ROWS, ROWS, ROWS]

    def _parts(self, size: int) -> tuple[torch.Tensor, ...]:
        """The first nine columns, padded, as views of the buffer. Those of rows come first, so
        that they lie in the same place for every size."""
        sizes = self._sizes(size)
        order = [*sizes[3:], *sizes[:3]]
        parts = torch.split_with_sizes(self._buffer[: sum(order)], order)
        return (*parts[6:], *parts[:6])

    def _fill(self, columns: Columns, size: int) -> None:
        padding = [0, 0, 0, self._slots.padding, columns.ends[-1], 0, 0, 0, self._slots.padding]
        padded = [
            np.full(length, value, np.int64)
            for length, value in zip(self._sizes(size), padding, strict=True)
        ]
        known: list[Any] = list(columns[:9])
        for target, column in zip(padded, known, strict=True):
            target[: len(column)] = column
        whole = self._slots.send(np.concatenate([*padded[3:], *padded[:3]]))[0]
        self._buffer[: len(whole)].copy_(whole)

    def _run(self, size: int, adapted: bool = False) -> None:
        """What a graph holds."""
        ids, positions, places, slots, ends, lengths, last, drawn_at, drawing = self._parts(size)
        state = self._slots.state
        batch = Batch(
            ids=ids,
            positions=positions,
            slot_mapping=places,
            block_tables=state.tables.index_select(0, slots),
            cu_seqlens=ends,
            context_lens=lengths,
            last_rows=last,
            query_lens_host=[size] * ROWS,
            context_lens_host=[],
            block_size=self._block_size,
            backend=self._backend,
            lora=self._lora.rows(size, self._lora.tiles(size)) if adapted else None,
        )
        self._backend.plan(batch)
        logits = self._model(batch, out=self.logits)
        noise = state.temperature.index_select(0, drawing), state.keys.index_select(0, drawing)
        out = self.ids, self.finite
        self._draw_kernel.draw(logits, *noise, drawn_at, cap=self._model.softcap, out=out)
        state.last.index_copy_(0, drawing, self.ids)
        state.lengths.index_copy_(0, drawing, drawn_at.int() + 1)


def _nothing() -> Columns:
    """A step of padding alone."""
    empty: Any = ([], np.empty(0), np.empty(0), [], [0], *([] for _ in range(9)))
    return Columns(*empty)
