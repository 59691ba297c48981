"""EngineClient's face without a model: answers follow the prompt's last line of text.

Run as a program it is `kvrun` on this engine, for tests that need a process of their own.
"""

import asyncio
import json
import struct
import sys
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import ClassVar

from kvrun.errors import EngineDead, InvalidRequest, KvrunError, NotFound, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.request import AdapterInfo, Delta, Logprob, Ready, Request, Stats
from kvrun.runtime.text import Text

CONTEXT = 512
VOCAB = 260


class FakeEngine:
    """ "say X": X, then the end · "wait X": the same, a token whenever `step` is called · "hang":
    a few tokens and no end · "queue": not even a first token · "flood": x as often as asked ·
    "break": the request fails · "die": the engine dies in the middle · anything else: the answer
    repeats it. With an adapter its name goes before X.
    """

    made: ClassVar[list["FakeEngine"]] = []

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.text = Text(config.model)
        self.ends = self.text.eos_token_ids
        self.requests: list[Request] = []
        self.running: dict[str, set[int]] = {}  # choices that have not ended, by request
        self.left: list[str] = []  # requests whose reader went before the end
        self.aborts: list[tuple[str, int | None]] = []
        self.closed = False
        self.known = dict(config.adapters)
        self.load_gate = asyncio.Event()
        self.adapter_gate = asyncio.Event()  # cleared, adapters take their time
        self.adapter_gate.set()
        if config.device != "cuda:7":  # a device that nobody has: a model that takes its time
            self.load_gate.set()
        self.on_restart: Callable[[KvrunError | Ready], None] = lambda news: None
        self._death = asyncio.Event()
        self._step = asyncio.Event()
        self._changed = asyncio.Condition()
        self.made.append(self)

    async def start(self) -> Ready:
        await self.load_gate.wait()
        return Ready(
            plan="weights 1 MB, KV 2 MB",
            max_model_len=self.config.max_model_len or CONTEXT,
            vocab_size=VOCAB,
            kv_tokens=4096,
            max_num_seqs=256,
            block_size=16,
            device="cpu",
            dtype="float32",
            attention="sdpa",
            load_seconds=0.0,
        )

    async def ended(self) -> KvrunError:
        await self._death.wait()
        return EngineDead("the engine process has ended.", cause="it was killed by signal 9")

    async def adapters(self) -> list[AdapterInfo]:
        return [self._info(name) for name in self.known]

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        await self.adapter_gate.wait()
        try:
            config = json.loads((Path(path) / "adapter_config.json").read_bytes())
        except FileNotFoundError as error:
            raise NotFound(f"{path} holds no adapter_config.json.") from error
        if config.get("peft_type") != "LORA":
            raise Unsupported(f"the adapter in {path} is of another type.")
        self.known[name] = path
        return self._info(name)

    async def unload_adapter(self, name: str) -> None:
        using = [r for r in self.requests if r.id in self.running and r.adapter == name]
        if using:
            raise InvalidRequest(f"the adapter '{name}' is in use.", hint="wait")
        del self.known[name]

    def _info(self, name: str) -> AdapterInfo:
        state = "failed" if "damaged" in self.known[name] else "host"
        return AdapterInfo(
            name=name, path=self.known[name], bytes=8, ranks=[4], state=state, load_seconds=0.5
        )

    async def stream(self, request: Request) -> AsyncGenerator[Delta]:
        if request.adapter not in (None, *self.known):
            raise InvalidRequest(f"there is no adapter '{request.adapter}'.")
        self.requests.append(request)
        choices = self.running[request.id] = set(range(request.params.n))
        try:
            answer = self._pool if request.pooling else self._answer
            async for delta in answer(request, choices):
                yield delta
        finally:
            if self.running.pop(request.id):
                self.left.append(request.id)

    async def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborts.append((request_id, index))
        if request_id in self.running:
            async with self._changed:
                self._changed.notify_all()

    def step(self) -> None:
        """Let every answer that waits go on by one token."""
        self._step.set()
        self._step = asyncio.Event()

    async def stats(self) -> Stats:
        stats = Stats(
            running=len(self.running), blocks_total=256, blocks_active=len(self.running), steps=7
        )
        stats.prompt_steps.counts[0], stats.prompt_steps.sum = 2, 0.0002
        stats.decode_steps.counts[1], stats.decode_steps.counts[-1] = 4, 1
        stats.decode_steps.sum = 200.0008
        stats.step_sizes = {1: 2, 3: 4, 2000: 1}
        stats.failed_steps = 3
        return stats

    async def close(self) -> None:
        self.closed = True

    # -- the answers ------------------------------------------------------------------------

    async def _pool(self, request: Request, choices: set[int]) -> AsyncGenerator[Delta]:
        """A vector of length 1 that tells the prompt's length."""
        words = self.text.decode(request.prompt_ids, skip_special=False)
        if words.startswith("queue"):
            await self._aborted(request)
        await asyncio.sleep(0)
        choices.clear()
        if (request.id, None) in self.aborts or words.startswith("break"):
            reason = "abort" if self.aborts else "error"
            yield Delta(request_id=request.id, finish_reason=reason, error="NaN")
            return
        size = 1 / len(request.prompt_ids)
        rest = (1 - size * size) ** 0.5
        state = struct.pack("<4f", size, 0.6 * rest, 0.8 * rest, 0.0)
        yield Delta(request_id=request.id, finish_reason="stop", state=state, cached_tokens=1)

    async def _answer(self, request: Request, choices: set[int]) -> AsyncGenerator[Delta]:
        prompt = self.text.decode(request.prompt_ids, skip_special=False)
        line = prompt.rpartition("<|user|>")[2].partition("<|end|>")[0]
        verb, _, rest = line.partition(" ")
        if verb == "break":
            for index in list(choices):
                choices.discard(index)
                yield Delta(request_id=request.id, index=index, finish_reason="error", error="NaN")
            return
        if verb == "queue":
            await self._aborted(request)
        ids = self._ids(verb, rest, line, request.adapter)
        most = request.params.max_tokens or CONTEXT - len(request.prompt_ids)
        ids = ids[:most]
        for count, token in enumerate(ids, 1):
            await (self._step.wait() if verb == "wait" else asyncio.sleep(0))
            for index in sorted(choices):
                if (request.id, None) in self.aborts or (request.id, index) in self.aborts:
                    choices.discard(index)
                    yield Delta(request_id=request.id, index=index, finish_reason="abort")
                    continue
                last = count == most or token in self.ends
                reason = ("length" if count == most else "stop") if last else None
                if reason:
                    choices.discard(index)
                yield Delta(
                    request_id=request.id,
                    index=index,
                    token_ids=[token],
                    logprobs=self._logprobs(request, token, index),
                    finish_reason=reason,
                    cached_tokens=4 if count == 1 else 0,
                    prompt_logprobs=self._prompt(request) if count == 1 and not index else None,
                )
        if verb == "die":
            self._death.set()
            raise EngineDead("the engine process has ended.", cause="it was killed by signal 9")
        if choices:
            await self._aborted(request)
            for index in sorted(choices):
                choices.discard(index)
                yield Delta(request_id=request.id, index=index, finish_reason="abort")

    async def _aborted(self, request: Request) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: (request.id, None) in self.aborts)

    def _ids(self, verb: str, rest: str, line: str, adapter: object) -> list[int]:
        if verb == "flood":
            return self.text.encode("x") * CONTEXT
        if verb in ("hang", "die"):
            return self.text.encode("Let me think")
        words = rest if verb in ("say", "wait") else f"You said: {line}"
        said = f"{adapter}: {words}" if adapter else words
        return [*self.text.encode(said), self.ends[0]]

    def _prompt(self, request: Request) -> list[Logprob] | None:
        count = request.params.prompt_logprobs
        if count is None:
            return None
        ids = request.prompt_ids[1:]
        return [Logprob(i, -float(n), [(i, -float(n))][:count]) for n, i in enumerate(ids, 1)]

    def _logprobs(self, request: Request, token: int, index: int) -> list[Logprob] | None:
        count = request.params.logprobs
        if count is None:
            return None
        # Later choices are likelier, so that best_of has something to choose.
        value = -0.5 / (index + 1)
        others = [(token + place, value - place) for place in range(count)]
        return [Logprob(token, value, others)]


if __name__ == "__main__":
    import kvrun.runtime.engine.client as client
    from kvrun.cli import main

    client.EngineClient = FakeEngine  # type: ignore[misc,assignment]
    main(sys.argv[1:])
