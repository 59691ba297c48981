"""Session: one model ready to answer; the engine in its own process, text on this side of it."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, Self

from kvrun.chat.pictures import text_of
from kvrun.errors import EngineDead, InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.request import (
    AdapterChoice,
    AdapterInfo,
    Delta,
    Logprob,
    Ready,
    Request,
    Stats,
)
from kvrun.runtime.sampling.params import SamplingParams

if TYPE_CHECKING:
    from kvrun.runtime.engine.client import EngineClient
    from kvrun.runtime.text import Answer, Prompt, Text

# Room that is kept for an answer when old turns have to go, if the question names no max_tokens.
ANSWER_ROOM = 256
# A prompt with more bytes than this for each token of the context is refused unread.
BYTES_PER_TOKEN = 16


@dataclass
class Choice:
    """One answer of a reply. `tokens` counts an end-of-text or stop token too."""

    index: int
    answer: "Answer"
    logprobs: list[Logprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.answer.text

    @property
    def tokens(self) -> int:
        return self.answer.tokens

    @property
    def finish_reason(self) -> str | None:
        return self.answer.finish_reason


@dataclass(frozen=True)
class Timing:
    """Seconds since the request was sent; `rate` is tokens/s after the first token."""

    first_token: float | None
    total: float
    rate: float | None


class Answering(Protocol):
    """One answer on its way: a session's, and a server's."""

    dropped: int
    cached_tokens: int

    @property
    def text(self) -> str: ...

    @property
    def finish_reason(self) -> str: ...

    @property
    def prompt_tokens(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def timing(self) -> Timing: ...

    def __aiter__(self) -> AsyncGenerator[tuple[int, str]]: ...


class Session:
    """Begins to start the engine when it is made; `async with` it, and `await ready()`.

    `connect` makes the engine's client, which starts the process; `open_text` reads the tokenizer
    while that process loads its weights. `adapter` answers from now on; None: the base model.
    """

    def __init__(
        self,
        name: str,
        config: EngineConfig,
        *,
        open_text: "Callable[[str], Text | None]",
        connect: "Callable[[EngineConfig], EngineClient]",
        adapter: str | None = None,
    ) -> None:
        self.name = name
        self.adapter = adapter
        self.config = config
        self.start_seconds = 0.0
        self._open_text = open_text
        self._connect = connect
        self._began = time.perf_counter()
        self._client = connect(config)
        self._alive = True
        self._restarting = asyncio.Lock()
        self._count = 0
        self._text: Text | None = None
        self._ready: Ready | None = None

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Begin to listen to the engine; `close` ends it."""
        self._starting = asyncio.create_task(self._client.start())
        await asyncio.sleep(0)

    async def close(self) -> None:
        """End the engine process."""
        await self._client.close()
        self._starting.cancel()
        with suppress(asyncio.CancelledError, KvrunError):
            await self._starting

    async def ready(self) -> Ready:
        """Wait until questions can be asked; raises what kept the engine or the tokenizer."""
        if self._text is None:
            self._text = await asyncio.to_thread(self._open_text, self.config.model)
            if self._text is None:
                raise Unsupported(
                    f"'{self.name}' cannot chat: its folder has no tokenizer.",
                    cause=f"no tokenizer.json in {self.config.model}",
                    hint="from Python, LLM(...).generate takes token ids",
                )
        self._ready = await self._starting
        self.start_seconds = time.perf_counter() - self._began
        return self._ready

    @property
    def text(self) -> "Text":
        """The tokenizer's side; there once `ready` has returned."""
        if self._text is None:
            raise RuntimeError("the session is not ready")
        return self._text

    @property
    def engine(self) -> Ready:
        """What the engine said of itself; there once `ready` has returned."""
        if self._ready is None:
            raise RuntimeError("the session is not ready")
        return self._ready

    def start_line(self) -> str:
        """How long it took until questions could be asked, and the engine's own share of it."""
        load = f"weights and pool {self.engine.load_seconds:.2f} s"
        return f"started in {self.start_seconds:.2f} s, {load}"

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return min(self.engine.max_model_len, self.engine.kv_tokens)

    @property
    def client(self) -> "EngineClient":
        """The engine itself, for its counters, pages and adapters; another one after `restart`."""
        return self._client

    async def stats(self) -> Stats:
        """The engine's counters."""
        return await self._client.stats()

    async def ended(self) -> KvrunError:
        """Wait until the engine has ended, and say why; the next question starts another one."""
        client = self._client
        error = await client.ended()
        if client is self._client:
            self._alive = False
        return error

    async def adapters(self) -> list[AdapterInfo]:
        """The adapters that can be used."""
        return await self._client.adapters()

    async def load_adapter(self, name: str, folder: str) -> AdapterInfo:
        """Make a PEFT folder usable as `name`. Raises KvrunError for what cannot be served."""
        info = await self._client.load_adapter(name, folder)
        self._remember(self.config.adapters | {name: folder})
        return info

    async def unload_adapter(self, name: str) -> None:
        """Forget an adapter; if it was in use here, the base model answers from now on."""
        await self._client.unload_adapter(name)
        self._remember({n: f for n, f in self.config.adapters.items() if n != name})
        if self.adapter == name:
            self.adapter = None

    def _remember(self, adapters: dict[str, str]) -> None:
        """What an engine that has to be started again shall know."""
        self.config = replace(self.config, adapters=adapters)

    async def ask(self, messages: list[dict[str, Any]], params: SamplingParams) -> "Reply":
        """Prepare an answer to the last message by the adapter in use; see `ask_as`."""
        return await self.ask_as(messages, params, self.adapter)

    async def ask_as(
        self, messages: list[dict[str, Any]], params: SamplingParams, adapter: AdapterChoice
    ) -> "Reply":
        """Prepare an answer to the last message; iterate over the reply to get it.

        The oldest turns are left out when everything does not fit; `Reply.dropped` counts them.
        Raises InvalidRequest when the question alone is too long, EngineDead when the engine died
        and cannot be started again.
        """
        if not self._alive:
            await self.restart()
        prompt, dropped = await asyncio.to_thread(self._fit, messages, params)
        room = self.context - len(prompt.ids)
        params = replace(params, max_tokens=min(params.max_tokens or room, room))
        self._count += 1
        request = Request(
            id=f"chat-{self._count}",
            prompt_ids=prompt.ids,
            params=params,
            adapter=adapter,
            images=prompt.images,
        )
        return Reply(self, request, dropped)

    async def deltas(self, request: Request) -> AsyncGenerator[Delta]:
        """The engine's answer to one request; remembers when the engine is found dead."""
        stream = self._client.stream(request)
        try:
            async for delta in stream:
                yield delta
        except EngineDead:
            self._alive = False
            raise
        finally:
            await stream.aclose()  # which tells the engine to stop

    async def restart(self) -> None:
        """End the engine and start another one; whoever comes meanwhile waits for the same."""
        async with self._restarting:
            if self._alive:
                return
            await self._client.close()
            self._client = self._connect(self.config)
            self._ready = await self._client.start()
            self._alive = True

    def _fit(self, messages: list[dict[str, Any]], params: SamplingParams) -> "tuple[Prompt, int]":
        """The prompt of as many of the latest turns as fit, and how many turns were left out."""
        system = [m for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        self._refuse_bulk(text_of(turns[-1]["content"]))
        room = min(params.max_tokens or ANSWER_ROOM, max(1, self.context // 4))
        dropped = 0
        while True:
            prompt = self._encode([*system, *turns])
            if len(prompt.ids) + room <= self.context or len(turns) == 1:
                break
            dropped += 1
            # A turn is a question with its answer: the next one starts with a question again.
            later = (i for i, m in enumerate(turns) if i and m["role"] == "user")
            turns = turns[next(later, len(turns) - 1) :]
        if (count := len(prompt.ids)) >= self.context:
            raise InvalidRequest(
                f"the prompt has {count:,} tokens; {self.context:,} fit with their answer.",
                cause=self._why_context(),
                hint="shorten the prompt, or give the model more room (--max-model-len, "
                "--kv-memory) if it can take it",
            )
        return prompt, dropped

    def _encode(self, messages: list[dict[str, Any]]) -> "Prompt":
        if self.text.chat_template_known:
            return self.text.converse(messages, local=True)
        if messages[0]["role"] == "system":
            raise InvalidRequest(
                f"'{self.name}' takes no system prompt.",
                cause="the model has no chat template; it only continues a text",
            )
        return self.text.encode_with("\n".join(text_of(m["content"]) for m in messages), [])

    def _refuse_bulk(self, content: str) -> None:
        if not content.strip():
            raise InvalidRequest("the prompt is empty.", hint="say something")
        most = BYTES_PER_TOKEN * self.context
        if len(content) > most:
            raise InvalidRequest(
                f"the prompt has {len(content):,} characters; "
                f"the model takes {self.context:,} tokens.",
                cause=f"more than {most:,} characters cannot fit",
                hint="shorten the prompt",
            )

    def _why_context(self) -> str:
        if self.engine.kv_tokens < self.engine.max_model_len:
            return f"the KV cache holds {self.engine.kv_tokens:,} tokens"
        return f"the model's context is {self.engine.max_model_len:,} tokens"


class Reply:
    """One answer (or `params.n` of them): iterate over (choice index, new text), then read it.

    Leaving the iteration early, or cancelling it, stops the engine's work on it; the choices then
    keep what had arrived, with finish_reason "abort".
    """

    def __init__(self, session: Session, request: Request, dropped: int) -> None:
        self.request = request
        self.dropped = dropped
        self.cached_tokens = 0
        params = request.params
        self.choices = [Choice(i, session.text.answer(params.stop)) for i in range(params.n)]
        self._session = session
        self._sent = self._first = self._last = 0.0

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> str:
        return self.choices[0].finish_reason or "abort"

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def tokens(self) -> int:
        return sum(choice.tokens for choice in self.choices)

    @property
    def timing(self) -> Timing:
        """All choices together; the rate counts what came after the first token's step."""
        seconds = self._last - self._first
        after = self.tokens - len(self.choices)
        return Timing(
            first_token=self._first - self._sent if self._first else None,
            total=self._last - self._sent if self._last else 0.0,
            rate=after / seconds if after > 0 and seconds > 0 else None,
        )

    async def __aiter__(self) -> AsyncGenerator[tuple[int, str]]:
        self._sent = time.perf_counter()
        try:
            async with aclosing(self._session.deltas(self.request)) as deltas:
                async for delta in deltas:
                    piece = self._take(delta)
                    if piece:
                        yield delta.index, piece
                    if all(choice.finish_reason for choice in self.choices):
                        break
        finally:
            for choice in self.choices:
                choice.answer.finish_reason = choice.finish_reason or "abort"

    def _take(self, delta: Delta) -> str:
        """Count a delta in; returns the text that has become final."""
        choice = self.choices[delta.index]
        if choice.finish_reason:  # a stop string was met; the engine had not heard of it yet
            return ""
        self._last = time.perf_counter()
        if delta.token_ids and not self._first:
            self._first = self._last
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        if delta.finish_reason == "error":
            choice.answer.finish_reason = "error"
            raise KvrunError("the engine could not finish the answer.", cause=delta.error or "")
        piece, count = choice.answer.take(delta.token_ids, delta.finish_reason)
        choice.logprobs += (delta.logprobs or [])[:count]
        return piece


def describe(reply: Answering) -> dict[str, Any]:
    """The counts and times of a reply as plain values, seconds and tokens/s rounded."""
    timing = reply.timing
    return {
        "prompt_tokens": reply.prompt_tokens,
        "cached_tokens": reply.cached_tokens,
        "completion_tokens": reply.tokens,
        "finish_reason": reply.finish_reason,
        "first_token_seconds": None if timing.first_token is None else round(timing.first_token, 4),
        "total_seconds": round(timing.total, 4),
        "tokens_per_second": None if timing.rate is None else round(timing.rate, 1),
    }
