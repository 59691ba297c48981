"""Child: one engine process, the pipe to it, and what is known of its end."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import IO

import msgspec

from kvrun.errors import EngineDead, KvrunError
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine import wire

# Threads of the engine wait for each other awake for a moment, then they sleep: for longer, they
# would take the cores from the very threads they wait for as soon as another program is busy. Of
# 0, 300, 1,000, 3,000 and 10,000 turns, 3,000 gave most to 1 and 8 requests on two idle cores. The
# second name is LLVM's, in milliseconds.
PATIENT = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}


class Garbled(EngineDead):
    """Its words could not be understood; another process would say the same."""


class Child:
    """Started at once. `listen` begins to hand on what it says, until it has ended."""

    def __init__(self, config: EngineConfig) -> None:
        self.closing = False
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in `release`
        debug = bool(os.environ.get("KVRUN_DEBUG"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvrun.runtime.engine.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if debug else self._errors,
            env={**({} if "OMP_WAIT_POLICY" in os.environ else PATIENT), **os.environ},
            # Ctrl+C in the terminal must reach this process only.
            start_new_session=True,
        )
        assert self.process.stdin
        assert self.process.stdout
        self._outlet = self.process.stdin
        self._source = self.process.stdout
        with suppress(BrokenPipeError):
            wire.send(self._outlet, config)

    def listen(
        self, hear: Callable[[wire.FromEngine], None], ended: Callable[[KvrunError], None]
    ) -> None:
        """Call `hear` with each message and `ended` once, both from a thread."""
        threading.Thread(
            target=self._listen, args=(hear, ended), daemon=True, name="engine-listen"
        ).start()

    def write(self, body: bytes) -> None:
        """Send an encoded message. A pipe that is broken or closed says nothing here: `ended`
        tells."""
        with suppress(OSError, ValueError):
            wire.write(self._outlet, body)

    def hang_up(self) -> None:
        """What makes it end."""
        self.closing = True
        with suppress(OSError):
            self._outlet.close()

    def release(self) -> None:
        """Wait for its end, and close what belonged to it."""
        self.process.wait()
        with suppress(OSError):
            self._outlet.close()
        self._source.close()
        self._errors.close()

    def _listen(
        self, hear: Callable[[wire.FromEngine], None], ended: Callable[[KvrunError], None]
    ) -> None:
        fault: KvrunError | None = None
        try:
            for frame in wire.frames(self._source):
                message = wire.from_engine.decode(frame)
                if isinstance(message, wire.Died):
                    fault = message.fault.error()
                else:
                    hear(message)
        except (msgspec.MsgspecError, OSError) as error:
            # What follows cannot be understood either, and nobody may wait for it.
            fault = Garbled("the engine's words are garbled.", cause=str(error))
            self.process.kill()
        code = self.process.wait()
        ended(fault or self._obituary(code))

    def _obituary(self, code: int) -> KvrunError:
        if self.closing:
            return EngineDead("the engine was closed.")
        how = f"it was killed by signal {-code}" if code < 0 else f"it ended with code {code}"
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace").strip().splitlines()
        said = f"; its last words: {words[-1]}" if words else ""
        return EngineDead(
            "the engine process has ended.",
            cause=how + said,
            hint="start again; KVRUN_DEBUG=1 shows the engine's own messages",
        )
