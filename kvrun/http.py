"""An HTTP/1.1 client: connections that are kept, bodies piece by piece as they arrive.

On asyncio's streams alone: the HTTP package below huggingface_hub goes by another name from one
release to the next, and what a client spends on an event it takes from what `bench` measures.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from kvrun.errors import InvalidRequest

CONNECT_SECONDS = 30
CUT_SHORT = "the connection was closed before the end"
MOST_HEADERS = 200
MOST_LINE = 1 << 22  # bytes of an event's line
PIECE = 1 << 16


class BadReply(ValueError):
    """What came back is not HTTP."""


@dataclass(frozen=True)
class Address:
    """Where a server listens, and the path below which its routes lie."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str) -> "Address":
        """Of an http or https URL; without a scheme it is http. Raises InvalidRequest."""
        full = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(full)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidRequest(f"'{url}' is no URL.", cause=str(error)) from error
        wrong = parts.scheme not in ("http", "https") or parts.username or parts.query
        # What goes into a head must not be able to end a line of it.
        if wrong or not host or not full.isascii() or not full.isprintable() or " " in full:
            raise InvalidRequest(f"'{url}' is no URL of a server.", hint="http://127.0.0.1:3000")
        secure = parts.scheme == "https"
        return cls(secure, host, port or (443 if secure else 80), parts.path.rstrip("/"))

    def __str__(self) -> str:
        return f"http{'s' if self.secure else ''}://{self.netloc}"

    @property
    def netloc(self) -> str:
        """HOST:PORT as a head says it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass
class Link:
    """One connection; `used` says that it has answered before, and may have been closed since."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False


@dataclass
class Response:
    """Status and headers (names in lower case); the body has not been read yet."""

    status: int
    headers: Mapping[str, str]
    link: Link = field(repr=False)
    complete: bool = False  # the body was read to its end

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it arrives. Raises EOFError when it is cut short, and BadReply."""
        reader = self.link.reader
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            while size := _size(await reader.readline()):
                yield await reader.readexactly(size)
                await reader.readexactly(2)
            while (await reader.readline()).strip():
                pass  # trailers
        elif "content-length" in self.headers:
            left = _count(self.headers["content-length"])
            while left:
                data = await reader.read(min(left, PIECE))
                if not data:
                    raise EOFError(CUT_SHORT)
                left -= len(data)
                yield data
        else:
            while data := await reader.read(PIECE):
                yield data
        self.complete = True

    async def read(self, most: int = 1 << 24) -> bytes:
        """The whole body, as long as it is not longer than `most` bytes."""
        body = b""
        async for piece in self.pieces():
            body += piece
            if len(body) > most:
                raise BadReply(f"the body is longer than {most} bytes")
        return body

    @property
    def keeps(self) -> bool:
        """Whether the connection can be used again."""
        bounded = {"transfer-encoding", "content-length"} & self.headers.keys()
        closes = "close" in self.headers.get("connection", "").lower()
        return self.complete and bool(bounded) and not closes


class Client:
    """Requests to one server. Connections are kept and used again; there are as many as needed."""

    def __init__(self, address: Address, *, api_key: str | None = None) -> None:
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise InvalidRequest("the API key holds characters that cannot be sent.")
        self.address = address
        self._key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._tls = ssl.create_default_context() if address.secure else None
        self._idle: list[Link] = []

    @asynccontextmanager
    async def request(self, method: str, path: str, body: bytes = b"") -> AsyncIterator[Response]:
        """Send a request; the connection is kept if the body has been read to its end.

        Raises OSError, EOFError or BadReply.
        """
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.address.netloc}\r\n{self._key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Accept: text/event-stream, application/json\r\n\r\n"
        )
        response = await self._answered(head.encode() + body)
        try:
            yield response
        finally:
            if response.keeps:
                response.link.used = True
                self._idle.append(response.link)
            else:
                response.link.writer.transport.abort()

    def close(self) -> None:
        """Let go of every connection."""
        for link in self._idle:
            link.writer.transport.abort()
        self._idle.clear()

    async def _answered(self, message: bytes) -> Response:
        while True:
            link = self._idle.pop() if self._idle else await self._connect()
            try:
                link.writer.write(message)
                await link.writer.drain()
                return await _head(link)
            except BaseException as error:
                link.writer.transport.abort()
                # A kept connection may have ended while nobody looked: that is not an answer.
                if not link.used or not isinstance(error, ConnectionError | EOFError):
                    raise

    async def _connect(self) -> Link:
        opening = asyncio.open_connection(self.address.host, self.address.port, ssl=self._tls)
        try:
            return Link(*await asyncio.wait_for(opening, CONNECT_SECONDS))
        except TimeoutError as error:
            raise OSError(f"no connection within {CONNECT_SECONDS} s") from error


async def events(response: Response) -> AsyncIterator[bytes]:
    """The data of server-sent events, one by one. Raises what `pieces` raises."""
    rest, data = b"", []
    async for piece in response.pieces():
        *lines, rest = (rest + piece).split(b"\n")
        if len(rest) > MOST_LINE:
            raise BadReply("a line of the answer does not end")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                yield b"\n".join(data)
                data = []


def describe(error: BaseException) -> str:
    """An exception of a connection in one line."""
    if isinstance(error, asyncio.IncompleteReadError):
        return CUT_SHORT
    text = getattr(error, "strerror", None) or str(error)
    return str(text).splitlines()[0] if text else type(error).__name__


def said(body: bytes) -> str:
    """What a server says of an error, whatever form it has, in one short line."""
    try:
        value = json.loads(body)
        error = value.get("error", value) if isinstance(value, dict) else value
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = body.decode(errors="replace")
    return " ".join(str(text).split())[:300] or "without a word"


async def _head(link: Link) -> Response:
    status = 100
    while status < 200 and status != 101:  # what comes before the answer itself
        first = await link.reader.readline()
        if not first:
            raise EOFError("the connection was closed without an answer")
        words = first.split(maxsplit=2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise BadReply("what answers does not speak HTTP/1.1")
        status = int(words[1])
        headers = await _headers(link.reader)
    return Response(status, headers, link, complete=status in (204, 304))


async def _headers(reader: asyncio.StreamReader) -> dict[str, str]:
    headers: dict[str, str] = {}
    for _ in range(MOST_HEADERS):
        line = await reader.readline()
        if not line:
            raise EOFError("the connection was closed inside the head of an answer")
        if not line.strip():
            return headers
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    raise BadReply(f"the answer has more than {MOST_HEADERS} headers")


def _size(line: bytes) -> int:
    if not line:
        raise EOFError(CUT_SHORT)
    with suppress(ValueError):
        size = int(line.split(b";")[0].strip(), 16)
        if size >= 0:
            return size
    raise BadReply("a chunk of the answer has no size")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise BadReply("the answer has no length")
    return int(text)
