"""Service: one model behind HTTP: its engine, its text, what it is called, how much it takes on."""

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kvrun.errors import KvrunError, Unsupported
from kvrun.folder import load
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.request import AdapterInfo, Ready, Stats
from kvrun.server import log
from kvrun.server.adapters import Adapters, check_names
from kvrun.server.errors import ApiError
from kvrun.server.metrics import LoraUse, Metrics
from kvrun.server.settings import Settings
from kvrun.server.streams import Streams

if TYPE_CHECKING:
    from kvrun.runtime.engine.client import EngineClient
    from kvrun.runtime.text import Text
    from kvrun.server.generation import Generation
    from kvrun.server.tracing.otel import Tracing

Phase = Literal["loading", "ready", "draining", "dead"]
Result = TypeVar("Result")

# What clients say when they have to name a model and mean the one that is served.
ANY_MODEL = frozenset({"", "tgi", "dummy", "kvrun"})
NO_ADAPTER = frozenset({"", "empty"})  # ancestors of this server called the base "empty"
# A prompt with more bytes than this for each token of the context is refused unread.
BYTES_PER_TOKEN = 16
STATS_PATIENCE = 1.0  # seconds; a step may take longer, and then the last counters have to do
WORDS: dict[Phase, str] = {
    "loading": "The model is loading.",
    "draining": "The server is shutting down.",
    "dead": "The engine has ended.",
}


def _tracing(settings: Settings) -> "Tracing | None":
    """Raises MissingExtra or InvalidRequest where spans are asked for and cannot be made."""
    if settings.otlp_endpoint is None:
        return None
    otel = load("kvrun.server.tracing", "otel")
    tracing: Tracing = otel.Tracing(
        otel.to_collector(settings.otlp_endpoint), settings.otlp_service_name
    )
    return tracing


def unknown(name: str) -> ApiError:
    """No model and no adapter is called so."""
    words = f"There is no model or adapter '{name[:96]}' here."
    return ApiError("unknown_model", words, param="model")


class Service:
    """Begins to start the engine when it is made; `start` waits until it can take requests.

    Its phase goes from "loading" to "ready" and ends in "draining" or "dead".
    """

    def __init__(
        self,
        settings: Settings,
        config: EngineConfig,
        *,
        open_text: "Callable[[str], Text | None]",
        connect: "Callable[[EngineConfig], EngineClient]",
    ) -> None:
        self.settings = settings
        self.config = config
        self.tracing = _tracing(settings)
        check_names(settings.adapters, self._own_names)
        self.client = connect(config)
        self.client.on_restart = self._restarted
        self.restarting = False  # the engine has died, and the next one is not ready
        self.adapters = Adapters(settings, self.client, self._own_names)
        self.metrics = Metrics()
        self.phase: Phase = "loading"
        self.created = self.now()
        self.streams = Streams()
        self.live: set[Generation] = set()
        self.active = 0  # answers that run or wait
        self.log_errors: Callable[[], int] = lambda: 0
        self._open_text = open_text
        self._text: Text | None = None
        self._ready: Ready | None = None
        self._numbers = itertools.count(1)
        self._threads = ThreadPoolExecutor(settings.validation_workers, "text")
        self._idle = asyncio.Event()
        self._idle.set()
        self._stats = Stats()
        self._infos: list[AdapterInfo] = []
        self._warned: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- its life ---------------------------------------------------------------------------

    async def start(self) -> None:
        """Load the model. Raises what kept the engine or the tokenizer."""
        loop = asyncio.get_running_loop()
        opening = loop.run_in_executor(self._threads, self._read_text)
        try:
            self._ready = await self.client.start()
        finally:
            self._text = await opening
        limits = (self.settings.max_input_tokens, self.settings.max_total_tokens)
        if any(limit and limit > self.max_total_tokens for limit in limits):
            raise Unsupported(
                f"the model and its cache take {self.max_total_tokens:,} tokens in all.",
                hint="ask for a smaller --max-input-tokens or --max-total-tokens",
            )
        self.metrics.set_sizes(self.max_input_tokens, self.max_total_tokens)
        if self.phase == "loading":
            self.phase = "ready"

    def _read_text(self) -> "Text | None":
        """All that is read from files, so that no request depends on them."""
        text = self._open_text(self.config.model)
        if text is not None:
            _ = text.eos_token_ids, text.generation_defaults
        return text

    @property
    def healthy(self) -> bool:
        """Whether requests would be computed at once; while the engine is started again they
        are taken and wait."""
        return self.phase == "ready" and not self.restarting

    def _restarted(self, news: KvrunError | Ready) -> None:
        self.restarting = isinstance(news, KvrunError)
        if isinstance(news, KvrunError):
            self.metrics.restarts += 1
            log.event("the engine has ended and is started again", logging.WARNING,
                      cause=news.cause or news.what, active=self.active)  # fmt: skip
        else:
            self._ready = news
            log.event("ready again", plan=news.plan, seconds=round(news.load_seconds, 2))

    async def watch(self) -> KvrunError:
        """Wait until the engine has ended; nobody is served after that."""
        error = await self.client.ended()
        if self.phase in ("loading", "ready"):
            self.phase = "dead"
        return error

    async def drain(self, seconds: float) -> None:
        """Take nothing new, let what runs finish; what still runs after `seconds` is cut short."""
        self.phase = "draining" if self.phase != "dead" else "dead"
        if await self._emptied(seconds):
            return
        log.event("the time to drain is over", cut_short=self.active)
        for generation in list(self.live):
            generation.cut_short("drain")
        await self._emptied(2.0)

    async def close(self) -> None:
        await self.client.close()
        if self.tracing:
            await asyncio.to_thread(self.tracing.close)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _emptied(self, seconds: float) -> bool:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
            return True
        return False

    # -- who gets in ------------------------------------------------------------------------

    def require_ready(self) -> None:
        """Raises ApiError (unavailable) unless requests can be served now."""
        if self.phase != "ready":
            raise ApiError("unavailable", WORDS[self.phase])

    @property
    def full(self) -> bool:
        """Whether there is no place for even one more answer."""
        return self.active >= self.settings.max_concurrent_requests

    @contextmanager
    def admitted(self, answers: int) -> Iterator[None]:
        """A place for so many answers. Raises ApiError (overloaded) when there is none."""
        self.require_ready()
        if self.active + answers > self.settings.max_concurrent_requests:
            raise ApiError("overloaded", "Model is overloaded")
        self.active += answers
        self._idle.clear()
        try:
            yield
        finally:
            self.active -= answers
            if not self.active:
                self._idle.set()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside everything else; nobody waits for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @staticmethod
    def now() -> int:
        """Seconds since 1970, for answers that say when they were made."""
        return int(datetime.now(UTC).timestamp())

    def number(self) -> int:
        """A number that no other request of this server has."""
        return next(self._numbers)

    def warn_once(self, name: str) -> None:
        """Say once that a field of a body means nothing here; the number of names is bounded."""
        name = name[:64]
        if name not in self._warned and len(self._warned) < 100:
            self._warned.add(name)
            log.event("a field is ignored", field=name)

    # -- the model --------------------------------------------------------------------------

    @property
    def engine(self) -> Ready:
        """What the engine said of itself."""
        if self._ready is None:
            raise ApiError("unavailable", WORDS["loading"])
        return self._ready

    @property
    def loaded(self) -> bool:
        return self._ready is not None

    @property
    def text(self) -> "Text":
        """The tokenizer's side. Raises ApiError (validation) for a model without one."""
        if self._text is None:
            raise ApiError("validation", "The model has no tokenizer; send token ids.")
        return self._text

    @property
    def has_text(self) -> bool:
        return self._text is not None

    @property
    def max_total_tokens(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        most = min(self.engine.max_model_len, self.engine.kv_tokens)
        return min(most, self.settings.max_total_tokens or most)

    @property
    def max_input_tokens(self) -> int:
        most = self.max_total_tokens - 1
        return min(most, self.settings.max_input_tokens or most)

    @cached_property
    def names(self) -> list[str]:
        """What the model is called, the name to show first."""
        name, folder = self.settings.model, Path(self.config.model)
        shown = folder.name if Path(name).is_absolute() or name.startswith(".") else name
        return list(dict.fromkeys(self.settings.served_names)) or [shown]

    def adapter(self, *wanted: str | None) -> str | None:
        """The adapter that a request names, by model, adapter_id or lora_id; None for the base.

        Raises ApiError (unknown_model): no name is silently the base; (validation) for two.
        """
        found: str | None = None
        for name in wanted:
            if name is None or name in self._own_names:
                continue
            if name not in self.adapters:
                if name.startswith("http"):
                    continue
                raise unknown(name)
            if found not in (None, name):
                words = f"Two adapters are named, '{found}' and '{name}'; a request has one."
                raise ApiError("validation", words, param="adapter_id")
            found = name
        return found

    @cached_property
    def _own_names(self) -> set[str]:
        """What means the model itself."""
        return {*ANY_MODEL, *NO_ADAPTER, *self.names, self.settings.model}

    # -- text -------------------------------------------------------------------------------

    async def in_thread(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Run what holds the interpreter for long outside the event loop."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, *arguments)

    async def encode(self, prompt: str, param: str = "prompt") -> list[int]:
        """Token ids of a raw prompt."""
        self.refuse_bulk(len(prompt), param)
        return await self.in_thread(self.text.encode, prompt)

    def refuse_bulk(self, characters: int, param: str) -> None:
        """Raises ApiError (too_long) for a text that cannot fit, whatever it says."""
        most = BYTES_PER_TOKEN * self.max_total_tokens
        if characters > most:
            raise ApiError(
                "too_long",
                f"The prompt has {characters:,} characters; the context of "
                f"{self.max_total_tokens:,} tokens takes at most {most:,}.",
                param=param,
            )

    def check_length(self, count: int, max_tokens: int | None, param: str) -> None:
        """Raises ApiError (too_long) in both dialects' words for what does not fit."""
        if count == 0:
            words = f"{param} is empty; it must have at least one token."
            raise ApiError("validation", words, param=param, native="`inputs` cannot be empty")
        if count > self.max_input_tokens:
            most = self.max_input_tokens
            raise ApiError(
                "too_long",
                f"This model's maximum prompt length is {most} tokens. However, your prompt has "
                f"{count} tokens.",
                param=param,
                native=f"`inputs` must have less than {most} tokens. Given: {count}",
            )
        if max_tokens is not None and count + max_tokens > self.max_total_tokens:
            most = self.max_total_tokens
            raise ApiError(
                "too_long",
                f"This model's maximum context length is {most} tokens. However, you requested "
                f"{count + max_tokens} tokens ({count} in the prompt, {max_tokens} in the answer).",
                param=param,
                native=f"`inputs` tokens + `max_new_tokens` must be <= {most}. Given: {count} "
                f"`inputs` tokens and {max_tokens} `max_new_tokens`",
            )

    # -- counters ---------------------------------------------------------------------------

    async def stats(self) -> Stats:
        """The engine's counters; those of the last time while a step takes long."""
        if self.phase in ("ready", "draining") and self.loaded:
            with suppress(TimeoutError, KvrunError):
                async with asyncio.timeout(STATS_PATIENCE):
                    self._stats = await self.client.stats()
                    self._infos = await self.client.adapters()
        return self._stats

    def lora_use(self) -> LoraUse:
        """Which adapters there were when `stats` was last asked, and which are used now."""
        running, waiting = (
            {g.adapter for g in self.live if g.adapter and bool(g.first) is begun}
            for begun in (True, False)
        )
        return LoraUse(self._infos, running, waiting, self.now())
