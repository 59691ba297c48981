"""Remote: answers of any server that speaks OpenAI's chat completions, streamed."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kvrun.chat.session import Timing
from kvrun.errors import InvalidRequest, KvrunError, NotFound, Unreachable
from kvrun.runtime.engine.request import AdapterChoice
from kvrun.runtime.sampling.params import SamplingParams

SECONDS = 30  # until a server has to have accepted, and answered a list of models
MOST = 1 << 22  # bytes of an answer that is not streamed
# What OpenAI's API itself knows; every server must take these.
FIELDS = ("max_tokens", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed")


@dataclass(frozen=True)
class Address:
    """Where a server is, and the path below which its routes lie."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> "Address":
        """Of an http or https URL, with or without /v1. Raises InvalidRequest for anything else."""
        full = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(full)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidRequest(f"'{url}' is no URL.", cause=str(error)) from error
        # What goes into a head must not be able to end a line of it.
        clean = full.isascii() and full.isprintable() and " " not in full
        if parts.scheme not in ("http", "https") or not host or not clean or parts.username:
            raise InvalidRequest(f"'{url}' is no URL of a server.", hint="http://127.0.0.1:3000")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        path = path if path.endswith("/v1") else f"{path}/v1"
        return cls(secure, host, port or (443 if secure else 80), path)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.secure else ''}://{host}:{self.port}"


class Remote:
    """One model of one server; each request has a connection of its own.

    `ask`'s adapter is the name of another model of the same server.
    """

    def __init__(self, url: str, model: str | None = None, *, api_key: str | None = None) -> None:
        """Raises InvalidRequest for what is no URL or no key."""
        self.address = Address.of(url)
        self.model = model
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidRequest("the API key holds characters that cannot be sent.")
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    @property
    def name(self) -> str:
        return self.model or str(self.address)

    async def models(self) -> list[str]:
        """The models the server lists. Raises Unreachable, NotFound or what the server says."""
        try:
            async with (
                asyncio.timeout(SECONDS),
                self._request("GET", f"{self.address.path}/models") as (status, lines),
            ):
                body = "\n".join([line async for line in lines])
        except (OSError, EOFError, ValueError) as error:
            raise self._unreachable(error) from error
        if status != 200:
            raise self._refused(status, body)
        try:
            names = [str(one["id"]) for one in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise NotFound(f"{self.address} lists no model.", cause=str(error)) from error
        return names

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
        path = f"{self.address.path}/chat/completions"
        try:
            async with self._request("POST", path, body) as (status, lines):
                if status != 200:
                    raise self._refused(status, "\n".join([line async for line in lines]))
                async for line in lines:
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data == "[DONE]":
                        return
                    if data:
                        event = json.loads(data)
                        if not isinstance(event, dict):
                            raise ValueError("an event is no JSON object")
                        yield event
        except (OSError, EOFError, ValueError) as error:
            raise self._unreachable(error) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, body: bytes = b""
    ) -> AsyncIterator[tuple[int, AsyncIterator[str]]]:
        """Status and lines of an answer, whose connection ends with it."""
        tls = ssl.create_default_context() if self.address.secure else None
        opening = asyncio.open_connection(self.address.host, self.address.port, ssl=tls, limit=MOST)
        reader, writer = await asyncio.wait_for(opening, SECONDS)
        try:
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: {self.address.host}\r\n{self._key}"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
                "Connection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
            words = (await reader.readline()).split(maxsplit=2)
            if len(words) < 2 or not words[1].isdigit():
                raise ValueError("what answers does not speak HTTP")
            chunked = False
            while line := (await reader.readline()).strip().lower():
                chunked = chunked or (line.startswith(b"transfer-encoding:") and b"chunked" in line)
            yield int(words[1]), _lines(reader, chunked)
        finally:
            writer.transport.abort()

    def _unreachable(self, error: BaseException) -> Unreachable:
        cause = str(error) or type(error).__name__
        return Unreachable(f"no answer from {self.address}.", cause=cause, hint="check the URL")

    def _refused(self, status: int, body: str) -> KvrunError:
        said = body
        with suppress(ValueError, AttributeError):
            error = json.loads(body).get("error", body)
            said = error.get("message", error) if isinstance(error, dict) else error
        cause = f"HTTP {status}: {' '.join(str(said).split())[:300]}"
        if status == 404:
            return NotFound(f"{self.address} has no such route or model.", cause=cause)
        hint = "--api-key KEY" if status in (401, 403) else ""
        return KvrunError(f"{self.address} refuses the request.", cause=cause, hint=hint)


async def _lines(reader: asyncio.StreamReader, chunked: bool) -> AsyncIterator[str]:
    rest = b""
    while True:
        if chunked:
            head = await reader.readline()
            if not head:
                raise EOFError("the connection was closed in the middle of the answer")
            size = int(head.split(b";")[0], 16)
            data = await reader.readexactly(size) if size else b""
            await reader.readline()
        else:
            data = await reader.read(1 << 16)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        if len(rest) > MOST:
            raise ValueError("a line of the answer does not end")
        for line in lines:
            yield line.rstrip(b"\r").decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


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
