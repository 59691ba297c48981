"""Transfer: adapters on their way to a GPU, in a thread and on a stream of their own."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from kvrun.errors import KvrunError

_ROOM = 32 << 20  # bytes of one of the buffers
_BUFFERS = 2
_THREADS = 8  # that fill a buffer together
_SHARE = 1 << 20  # bytes that are worth a thread


class Landing:
    """Stretches that have been sent."""

    def __init__(self, sent: "Future[torch.cuda.Event]") -> None:
        self.sent = sent

    def query(self) -> bool:
        """Whether all is there. Raises KvrunError if it will never be."""
        if not self.sent.done():
            return False
        try:
            return bool(self.sent.result().query())  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise KvrunError("an adapter cannot be brought to the device.", cause=why) from error


class Transfer:
    """Copies ordinary memory to the device, in order, through pinned buffers used in turns.

    To pin memory for each adapter would take longer than to read it, and hold up what others
    launch meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sender = ThreadPoolExecutor(1, "adapter-copy")
        self._fillers = ThreadPoolExecutor(_THREADS, "adapter-fill")
        self._ring: list[tuple[np.ndarray, torch.Tensor, torch.cuda.Event]] = []
        self._turn = 0
        self._ready = self._sender.submit(self._prepare)

    def send(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Landing:
        """Copy each tensor of the host to one of the device, behind what was sent before.

        All are contiguous. Sources must not change before the landing.
        """
        return Landing(self._sender.submit(self._send, parts))

    def _prepare(self) -> None:
        for _ in range(_BUFFERS):
            buffer = _pinned(_ROOM)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ring.append((buffer.numpy(), buffer, event))

    def _send(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.cuda.Event:
        self._ready.result()
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for source, target in parts:
                source, target = (t.view(-1).view(torch.uint8) for t in (source, target))
                for at in range(0, len(source), _ROOM):
                    self._piece(source[at : at + _ROOM], target[at : at + _ROOM])
            sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record(self._stream)
        return sent

    def _piece(self, source: torch.Tensor, target: torch.Tensor) -> None:
        memory, buffer, free = self._ring[self._turn]
        self._turn = (self._turn + 1) % _BUFFERS
        free.synchronize()  # what it held before has left it
        self._fill(memory[: len(source)], source.numpy())
        target.copy_(buffer[: len(source)], non_blocking=True)
        free.record(self._stream)

    def _fill(self, memory: np.ndarray, source: np.ndarray) -> None:
        share = max(_SHARE, -(-len(source) // _THREADS))
        list(
            self._fillers.map(
                lambda at: np.copyto(memory[at : at + share], source[at : at + share]),
                range(0, len(source), share),
            )
        )


def _pinned(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8, pin_memory=True)
