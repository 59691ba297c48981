"""Graphs: decode steps captured once per batch size, replayed over tensors that stay in place."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
import torch

from kvrun.runtime.attention import Backend
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.states import StateCache
from kvrun.runtime.device import kernel
from kvrun.runtime.engine.slots import Slots
from kvrun.runtime.kernels.step import Step
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.lora.resident import Resident
from kvrun.runtime.lora.rows import Assigned, Captured

# Every size up to 8, then steps that waste at most a quarter of the rows.
SIZES = (*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16),
         *range(160, 257, 32), *range(320, 1025, 64))  # fmt: skip
Replay = Callable[[], None]
Capture = Callable[[Replay], Replay]


class Graphs:
    """One step of up to `most` sequences that each get one token: embed, layers, draw, append.

    The step takes its input from `slots.state` and leaves its tokens there, so that a graph can
    be replayed over and over without a word from the host. Rows beyond a batch are padding. Steps
    with adapters have graphs of their own, captured when they are first wanted: two for each size,
    since few adapters with many rows each are best cut in another way than many.
    Raw `logits` [most, vocab], `ids` and `finite` [most] hold what the last replay has made,
    `drawn_at` [most] the places of its tokens.
    """

    def __init__(
        self,
        model: Decoder,
        backend: Backend,
        slots: Slots,
        *,
        most: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        capture: Capture,
        resident: Resident,
        states: StateCache | None = None,
    ) -> None:
        self._model = model
        self._backend = backend
        self._slots = slots
        self._states = states
        self._block_size = block_size
        self._step_kernel, self._draw_kernel = kernel("step", device), kernel("draw", device)
        self._sizes = [size for size in SIZES if size < most] + [most]
        self._rows: list[int] = []
        self._adapters: Assigned | None = None
        self._lora = Captured(resident, most, most)
        self._capture = capture
        pages = slots.state.tables.shape[1]

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros((most, *shape), dtype=dtype, device=device)

        self._row_slots = zeros(dtype=torch.int32)
        self._cu_seqlens = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._last_rows = torch.arange(most, device=device)
        self.step = Step(
            ids=zeros(dtype=torch.int64),
            positions=zeros(dtype=torch.int64),
            context_lens=zeros(dtype=torch.int32),
            slot_mapping=zeros(dtype=torch.int64),
            block_tables=zeros(pages, dtype=torch.int32),
            temperature=zeros(dtype=torch.float32),
            keys=zeros(2, dtype=torch.int32),
        )
        self.drawn_at = self.step.context_lens
        self.ids = zeros(dtype=torch.int64)
        self.finite = zeros(dtype=torch.bool)
        self.logits = zeros(model.vocab_size, dtype=dtype)
        self._show([])
        # The largest first: smaller ones then fit into the memory that it has taken.
        self._replays = {
            size: capture(lambda size=size: self._run(size))  # type: ignore[misc]
            for size in reversed(self._sizes)
        }
        self._adapted: dict[tuple[int, bool], Replay] = {}
        self.captured = len(self._replays)

    def takes(self, rows: int) -> bool:
        """Whether there is a graph for so many sequences."""
        return rows <= len(self._row_slots)

    def replay(self, rows: Sequence[int], adapters: Assigned | None = None) -> None:
        """One more token for the sequences in the slots `rows`, whose state the device knows."""
        size = self._sizes[bisect_left(self._sizes, len(rows))]
        if rows != self._rows or adapters != self._adapters:
            self._show(rows, adapters)
        if adapters is None:
            self._replays[size]()
            return
        key = size, self._lora.few(size)
        if key not in self._adapted:
            self._show([])  # what is run while it is captured must change nothing
            self._lora.clear()
            tiles = self._lora.tiles(*key)
            self._adapted[key] = self._capture(lambda: self._run(size, tiles))
            self._show(rows, adapters)
        self._adapted[key]()

    def _show(self, rows: Sequence[int], adapters: Assigned | None = None) -> None:
        if adapters is not None:
            self._lora.show(np.array(adapters.slots), self._slots.send)
        self._adapters = adapters
        padded = [*rows, *[self._slots.padding] * (len(self._row_slots) - len(rows))]
        self._row_slots.copy_(self._slots.send(padded)[0])
        self._rows = list(rows)

    def _run(self, size: int, tiles: int | None = None) -> None:
        """What a graph holds; `tiles` of adapters, None without any."""
        step = Step(**{f.name: getattr(self.step, f.name)[:size] for f in fields(Step)})
        slots, state = self._row_slots[:size], self._slots.state
        self._step_kernel.prepare(slots, state, step, self._block_size)
        batch = Batch(
            ids=step.ids,
            positions=step.positions,
            slot_mapping=step.slot_mapping,
            block_tables=step.block_tables,
            cu_seqlens=self._cu_seqlens[: size + 1],
            context_lens=step.context_lens,
            last_rows=self._last_rows[:size],
            query_lens_host=[1] * size,
            context_lens_host=[],
            block_size=self._block_size,
            backend=self._backend,
            lora=None if tiles is None else self._lora.rows(size, tiles),
        )
        if self._states is not None:
            batch.recurrent = self._states.rows(slots, batch.cu_seqlens, batch.context_lens)
        self._backend.plan(batch)
        logits = self._model(batch, out=self.logits[:size])
        out = self.ids[:size], self.finite[:size]
        wanted = step.temperature, step.keys, step.context_lens
        self._draw_kernel.draw(logits, *wanted, cap=self._model.softcap, out=out)
        self._step_kernel.advance(slots, out[0], state)


def cuda_capture(device: torch.device) -> Capture:
    """Captures into CUDA graphs that share one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(run: Replay) -> Replay:
        run()  # kernels are compiled and workspaces taken before, not while, it is captured
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        # Others, who read adapters, may take pinned memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            run()
        return graph.replay

    return capture
