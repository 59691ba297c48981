"""Remote: answers of any server that speaks OpenAI's chat completions, streamed."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from kvrun.chat.session import Timing
from kvrun.errors import InvalidRequest, KvrunError, NotFound, Unreachable
from kvrun.http import Address, Client, Response, describe, events, said
from kvrun.runtime.engine.request import AdapterChoice
from kvrun.runtime.sampling.params import SamplingParams

SECONDS = 30  # until a server has to have accepted, and answered a list of models
PATIENCE = 300  # seconds that a server may take to become ready
PAUSE = 1.0  # seconds until it is asked again
COMPLETIONS = "/chat/completions"
# What OpenAI's API itself knows; every server must take these.
FIELDS = ("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")


class Remote:
    """One model of one server; each request has a connection of its own.

    `base` is the path below which the server's routes lie.

    `ask`'s adapter is the name of another model of the same server.
    """

    def __init__(self, url: str, model: str | None = None, *, api_key: str | None = None) -> None:
        """Raises InvalidRequest for what is no URL or no key."""
        self.address = Address.of(url)
        self.model = model
        self._key = api_key
        Client(self.address, api_key=api_key)  # refuses a key that cannot be sent
        base = self.address.path.removesuffix(COMPLETIONS)
        self.base = base if base.endswith("/v1") else f"{base}/v1"

    @property
    def name(self) -> str:
        return self.model or str(self.address)

    async def models(self, waiting: Callable[[str], None] | None = None) -> list[str]:
        """The models the server lists. Raises Unreachable, NotFound or what the server says.

        With `waiting` a server that is not ready (503) is asked again for PATIENCE seconds;
        `waiting` hears once what the server says of it.
        """
        status, body = await self._listed()
        if status == 503 and waiting:
            waiting(said(body))
            with suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE):
                    while status == 503:
                        await asyncio.sleep(PAUSE)
                        status, body = await self._listed()
        if status != 200:
            raise self._refused(status, body)
        try:
            names = [str(one["id"]) for one in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise NotFound(f"{self.address} lists no model.", cause=str(error)) from error
        return names

    async def _listed(self) -> tuple[int, bytes]:
        try:
            async with (
                asyncio.timeout(SECONDS),
                self._request("GET", f"{self.base}/models") as response,
            ):
                return response.status, await response.read()
        except (OSError, EOFError, ValueError) as error:
            raise self._unreachable(error) from error

    async def ask(
        self, messages: list[dict[str, str]], params: SamplingParams, adapter: AdapterChoice = None
    ) -> "RemoteReply":
        """Prepare an answer; iterate over the reply to get it. Nothing is sent before."""
        if isinstance(adapter, list):
            raise InvalidRequest("a server takes no scale of an adapter.")
        model = adapter or self.model
        if model is None:
            model = self.model = (await self.models() or [""])[0]
        plain = SamplingParams()
        body: dict[str, Any] = {"model": model, "messages": messages, "stream": True}
        body["stream_options"] = {"include_usage": True}
        for name in FIELDS:
            if getattr(params, name) != getattr(plain, name):
                body[name] = getattr(params, name)
        if params.stop:
            body["stop"] = list(params.stop[:4])
        return RemoteReply(self, json.dumps(body).encode())

    async def events(self, body: bytes) -> AsyncGenerator[dict[str, Any]]:
        """The events of one streamed completion."""
        try:
            async with self._request("POST", self.base + COMPLETIONS, body) as response:
                if response.status != 200:
                    raise self._refused(response.status, await response.read())
                async for data in events(response):
                    if data == b"[DONE]":
                        return
                    event = json.loads(data)
                    if not isinstance(event, dict):
                        raise ValueError("an event is no JSON object")
                    yield event
        except (OSError, EOFError, ValueError) as error:
            raise self._unreachable(error) from error

    @asynccontextmanager
    async def _request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        client = Client(self.address, api_key=self._key)
        try:
            async with client.request(method, path, body) as response:
                yield response
        finally:
            client.close()

    def _unreachable(self, error: BaseException) -> Unreachable:
        cause = describe(error)
        return Unreachable(f"no answer from {self.address}.", cause=cause, hint="check the URL")

    def _refused(self, status: int, body: bytes) -> KvrunError:
        cause = f"HTTP {status}: {said(body)}"
        if status == 404:
            return NotFound(f"{self.address} has no such route or model.", cause=cause)
        hints = {401: "--api-key KEY", 403: "--api-key KEY", 503: "try again when it is ready"}
        return KvrunError(
            f"{self.address} refuses the request.", cause=cause, hint=hints.get(status, "")
        )


class RemoteReply:
    """One answer of a server; tokens are the server's own count, else pieces of text."""

    dropped = 0

    def __init__(self, remote: Remote, body: bytes) -> None:
        self.text = ""
        self.tokens = self.prompt_tokens = self.cached_tokens = 0
        self._remote = remote
        self._body = body
        self._reason: str | None = None
        self._sent = self._first = self._last = 0.0

    @property
    def finish_reason(self) -> str:
        return self._reason or "abort"

    @property
    def timing(self) -> Timing:
        seconds = self._last - self._first
        return Timing(
            first_token=self._first - self._sent if self._first else None,
            total=self._last - self._sent if self._last else 0.0,
            rate=(self.tokens - 1) / seconds if self.tokens > 1 and seconds > 0 else None,
        )

    async def __aiter__(self) -> AsyncGenerator[tuple[int, str]]:
        """Raises Unreachable, NotFound or what the server says of the request."""
        self._sent = time.perf_counter()
        events = self._remote.events(self._body)
        try:
            async for event in events:
                if piece := self._take(event):
                    yield 0, piece
        finally:
            await events.aclose()
        if self._reason is None:
            raise KvrunError("the server's answer ends in the middle.", hint="ask again")

    def _take(self, event: dict[str, Any]) -> str:
        if error := event.get("error"):
            said = error.get("message", error) if isinstance(error, dict) else error
            raise KvrunError("the server could not finish the answer.", cause=str(said))
        usage = event.get("usage") or {}
        self.prompt_tokens = int(usage.get("prompt_tokens") or self.prompt_tokens)
        choices = event.get("choices") or [{}]
        piece = (choices[0].get("delta") or {}).get("content") or ""
        self._reason = choices[0].get("finish_reason") or self._reason
        if piece:
            self._last = time.perf_counter()
            self._first = self._first or self._last
            self.text += piece
            self.tokens += 1
        self.tokens = int(usage.get("completion_tokens") or self.tokens)
        return str(piece)
