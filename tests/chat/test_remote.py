"""A server's answers: what is asked of it, how pieces arrive, what each failure says."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from kvrun.chat import remote as module
from kvrun.chat.remote import Remote
from kvrun.errors import InvalidRequest, KvrunError, NotFound, Unreachable
from kvrun.runtime.sampling.params import SamplingParams

Serve = Callable[[bytes], object]


def event(**choice: object) -> bytes:
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


PIECES = (
    event(delta={"role": "assistant"}, finish_reason=None)
    + event(delta={"content": "Hel"}, finish_reason=None)
    + b": a comment\n\n"
    + event(delta={"content": "lo ü"}, finish_reason=None)
    + event(delta={}, finish_reason="length")
    + b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}\n\n'
    + b"data: [DONE]\n\n"
)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(body: bytes, size: int = 7) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@asynccontextmanager
async def serving(*replies: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A server that gives each request the next of these, and the last again and again."""
    seen: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        seen.append(head + await reader.readexactly(length))
        writer.write(replies[min(len(seen), len(replies)) - 1])
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", seen
    finally:
        server.close()
        await server.wait_closed()


async def said(remote: Remote, params: SamplingParams | None = None) -> list[str]:
    reply = await remote.ask([{"role": "user", "content": "hi"}], params or SamplingParams())
    return [piece async for _, piece in reply]


async def test_an_answer_streams_in_and_is_counted_by_the_server() -> None:
    async with serving(HEAD + chunked(PIECES)) as (url, seen):
        remote = Remote(url, "m", api_key="k3y")
        params = SamplingParams(temperature=0.5, max_tokens=4, stop="END", top_k=9)
        reply = await remote.ask([{"role": "user", "content": "hi"}], params)
        assert [piece async for _, piece in reply] == ["Hel", "lo ü"]
        assert (reply.text, reply.finish_reason) == ("Hello ü", "length")
        assert (reply.prompt_tokens, reply.tokens) == (9, 3)
        assert reply.timing.first_token > 0
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1")
    assert b"Authorization: Bearer k3y" in head
    assert json.loads(body) == {
        "model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True,
        "stream_options": {"include_usage": True}, "temperature": 0.5, "max_tokens": 4,
        "stop": ["END"],
    }  # fmt: skip


async def test_a_body_without_chunks_and_an_adapter_as_the_model() -> None:
    async with serving(b"HTTP/1.0 200 OK\r\n\r\n" + PIECES) as (url, seen):
        reply = await Remote(url, "m").ask([], SamplingParams(), "sql")
        assert "".join([piece async for _, piece in reply]) == "Hello ü"
        assert json.loads(seen[0].partition(b"\r\n\r\n")[2])["model"] == "sql"


async def test_the_models_of_a_server() -> None:
    body = b'{"data": [{"id": "a"}, {"id": "b"}]}'
    async with serving(b"HTTP/1.1 200 OK\r\n\r\n" + body) as (url, seen):
        assert await Remote(f"{url}/v1/").models() == ["a", "b"]
        assert seen[0].startswith(b"GET /v1/models ")


LOADING = b'HTTP/1.1 503 No\r\n\r\n{"error": {"message": "The model is loading."}}'


async def test_a_server_that_loads_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE", 0)
    ready = b'HTTP/1.1 200 OK\r\n\r\n{"data": [{"id": "a"}]}'
    told: list[str] = []
    async with serving(LOADING, LOADING, LOADING, ready) as (url, seen):
        assert await Remote(url).models(told.append) == ["a"]
        assert len(seen) == 4
    assert told == ["The model is loading."]


async def test_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0)
    async with serving(LOADING) as (url, seen):
        with pytest.raises(KvrunError, match="refuses the request") as error:
            await Remote(url).models(lambda said: None)
    assert error.value.cause == "HTTP 503: The model is loading."
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n{}", NotFound, "no such route"),
        (b'HTTP/1.1 401 No\r\n\r\n{"error": {"message": "key?"}}', KvrunError, "key?"),
        (b'HTTP/1.1 500 Oh\r\n\r\n{"error": "broken"}', KvrunError, "broken"),
        (b"SSH-2.0\r\n", Unreachable, "does not speak HTTP"),
        (b"", Unreachable, "no answer"),
        (HEAD + b"5\r\ndata:", Unreachable, "no answer"),
        (HEAD + chunked(b"data: {broken\n\n"), Unreachable, "no answer"),
        (HEAD + chunked(event(delta={"content": "x"})), KvrunError, "ends in the middle"),
        (HEAD + chunked(b'data: {"error": {"message": "full"}}\n\n'), KvrunError, "full"),
    ],
)
async def test_what_goes_wrong_is_said(reply: bytes, kind: type[KvrunError], words: str) -> None:
    async with serving(reply) as (url, _):
        with pytest.raises(kind) as error:
            await said(Remote(url, "m"))
    assert words in str(error.value)


async def test_nobody_there() -> None:
    with pytest.raises(Unreachable, match="no answer from"):
        await Remote("http://127.0.0.1:1").models()


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://a b", "http://x:99999", "http://u@x"]
)
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(InvalidRequest):
        Remote(url)


def test_an_address() -> None:
    for url, where, base in (
        ("https://host/base", (True, "host", 443), "/base/v1"),
        ("[::1]:80/v1/chat/completions", (False, "::1", 80), "/v1"),
    ):
        remote = Remote(url)
        address = remote.address
        assert (address.secure, address.host, address.port) == where
        assert remote.base == base


async def test_a_key_or_a_scale_that_cannot_be_sent() -> None:
    with pytest.raises(InvalidRequest, match="API key"):
        Remote("http://x", api_key="a\r\nb")
    with pytest.raises(InvalidRequest, match="no scale"):
        await Remote("http://x", "m").ask([], SamplingParams(), [("sql", 0.5)])
