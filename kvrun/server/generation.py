"""Generation: one prompt on its way through the engine; pieces of its answers come out."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Literal

from kvrun.errors import InvalidRequest
from kvrun.runtime.engine.request import Delta, Image, Logprob, Request
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.text import Answer
from kvrun.server import log
from kvrun.server.call import Call, Timing
from kvrun.server.errors import ApiError
from kvrun.server.service import Service, unknown

Cut = Literal["queue", "time", "drain"]
PENDING = 64  # pieces that wait between several prompts and their reader


@dataclass(slots=True)
class Piece:
    """What one delta brings of one choice; `text` will not change any more."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprob]
    finish_reason: str | None


@dataclass
class Choice:
    """One answer so far. A token that ends it is counted and has no text."""

    answer: Answer
    stop_strings: Callable[[], bool]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.answer.text

    @property
    def finish_reason(self) -> str | None:
        return self.answer.finish_reason

    @property
    def mean_logprob(self) -> float:
        values = [entry.logprob for entry in self.logprobs]
        return sum(values) / len(values) if values else float("-inf")


class Generation:
    """Iterate over `pieces` to get the answers; leaving the loop early frees what they hold.

    `limit` seconds of waiting in the queue, and of the whole request, end it too.
    """

    def __init__(
        self,
        service: Service,
        call: Call,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        include_stop: bool = False,
        pooling: bool = False,
        images: Sequence[Image] = (),
    ) -> None:
        self.request = Request(
            id=f"serve-{service.number()}",
            prompt_ids=prompt_ids,
            params=params,
            adapter=adapter,
            pooling=pooling,
            images=list(images),
        )
        self.state = b""  # of a prompt that is pooled
        self.adapter = adapter
        self.choices = [self._choice(service, params, include_stop) for _ in range(params.n)]
        self.cached_tokens = 0
        self.prompt_logprobs: list[Logprob] = []  # from its second token on, if asked for
        self.sent = self.first = self.last = 0.0
        self.service = service
        self._call = call
        self._cut: Cut | None = None

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    def forget_answers(self) -> None:
        """Leave nothing but what is known of the prompt."""
        for choice in self.choices:
            choice.token_ids, choice.logprobs = [], []
            choice.answer.text, choice.answer.finish_reason = "", "length"

    def cut_short(self, why: Cut) -> None:
        """Have the engine end it; whatever has not ended then ends with the reason "abort"."""
        self._cut = self._cut or why
        self.service.spawn(self.service.client.abort(self.request.id))

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come.

        Raises ApiError: what the engine refuses, what fails, what has waited too long.
        """
        service = self.service
        settings = service.settings
        loop = asyncio.get_running_loop()
        self.sent = time.perf_counter()
        timer = loop.call_later(settings.queue_timeout, self.cut_short, "queue")
        service.live.add(self)
        try:
            async with aclosing(service.client.stream(self.request)) as deltas:
                async for delta in deltas:
                    if delta.finish_reason == "error":
                        raise await self._failure(delta)
                    if not self.first:
                        timer.cancel()
                        timer = loop.call_later(settings.request_timeout, self.cut_short, "time")
                    piece = self._take(delta)
                    if piece is None:
                        continue
                    yield piece
                    if all(choice.finish_reason for choice in self.choices):
                        break
                    if piece.finish_reason and not delta.finish_reason:
                        await service.client.abort(self.request.id, piece.index)
        except InvalidRequest:
            if self.adapter and self.adapter not in service.adapters:
                raise unknown(self.adapter) from None  # unloaded a moment ago
            raise
        finally:
            timer.cancel()
            service.live.discard(self)
            self._measure()

    def _take(self, delta: Delta) -> Piece | None:
        choice = self.choices[delta.index]
        if choice.finish_reason:  # a stop string was met; the engine had not heard of it yet
            return None
        if delta.finish_reason == "abort" and self._cut == "queue":
            waited = self.service.settings.queue_timeout
            raise ApiError("unavailable", f"The request has waited for {waited:g} seconds.")
        now = time.perf_counter()
        metrics = self.service.metrics
        if not self.first:
            self.first = now
            if not self.request.pooling:
                metrics.first_token.observe(now - self.sent)
        else:
            metrics.inter_token.observe(now - self.last)
        self.last = now
        self.state = delta.state or b""
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs or []
        self.cached_tokens = max(self.cached_tokens, delta.cached_tokens)
        text, count = choice.answer.take(delta.token_ids, delta.finish_reason)
        token_ids, logprobs = delta.token_ids[:count], (delta.logprobs or [])[:count]
        choice.token_ids += token_ids
        choice.logprobs += logprobs
        return Piece(delta.index, text, token_ids, logprobs, choice.finish_reason)

    async def _failure(self, delta: Delta) -> ApiError:
        """Why the engine has given up: the adapter may be to blame, and not the model."""
        log.event("the model has failed on a request", id=self._call.id, error=delta.error)
        if self.adapter:
            known = {info.name: info.state for info in await self.service.client.adapters()}
            if known.get(self.adapter) == "failed":
                words = f"The adapter '{self.adapter}' cannot be served; its files are damaged."
                return ApiError("validation", words, param="model")
        return ApiError("generation", "The model has failed on this request.")

    def _measure(self) -> None:
        metrics, tokens = self.service.metrics, self.tokens
        metrics.input_length.observe(self.prompt_tokens)
        if not self.request.pooling:
            metrics.generated_tokens.observe(tokens)
            metrics.max_new_tokens.observe(self.request.params.max_tokens or 0)
        metrics.validation.observe(self.sent - self._call.began)
        for choice in self.choices:
            metrics.finished[choice.finish_reason or "abort"] += 1
        metrics.adapter_requests[self.adapter or ""] += 1
        metrics.adapter_tokens[self.adapter or ""] += tokens
        if self.first:
            metrics.queue.observe(self.first - self.sent)
            metrics.inference.observe(self.last - self.first)
            if tokens > len(self.choices):
                spread = len(self.choices) * (self.last - self.first)
                metrics.per_token.observe(spread / (tokens - len(self.choices)))
        self._call.timings.append(
            Timing(
                self.sent, self.first, self.last, self.prompt_tokens, tokens, self.request.params,
                self.adapter,
            )
        )  # fmt: skip
        notes = self._call.notes
        notes["prompt_tokens"] = notes.get("prompt_tokens", 0) + self.prompt_tokens
        notes["generated_tokens"] = notes.get("generated_tokens", 0) + tokens

    @staticmethod
    def _choice(service: Service, params: SamplingParams, include_stop: bool) -> Choice:
        if not service.has_text:
            return Choice(Answer(None), lambda: False)
        stream = service.text.stream(stop=params.stop, include_stop=include_stop)
        return Choice(Answer(stream), lambda: stream.stopped)


async def together(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Piece]]:
    """Pieces of several generations as they come, each with the number of its generation."""
    if len(generations) == 1:
        async with aclosing(generations[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(PENDING)

    async def run(number: int) -> None:
        try:
            async with aclosing(generations[number].pieces()) as pieces:
                async for piece in pieces:
                    await queue.put((number, piece))
            await queue.put((number, None))
        except Exception as error:
            await queue.put((number, error))

    tasks = [asyncio.create_task(run(number)) for number in range(len(generations))]
    try:
        left = len(tasks)
        while left:
            number, item = await queue.get()
            if isinstance(item, Piece):
                yield number, item
            elif item is None:
                left -= 1
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
