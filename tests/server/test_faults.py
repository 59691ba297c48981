"""Rows H1 to H5 of the fault matrix: clients that leave, stall or dawdle harm nobody."""

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kvrun.server import run
from tests.server.conftest import PATIENCE, Served, listening, until


def request(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


class Client:
    """A raw connection that can behave badly."""

    opened: ClassVar[list[socket.socket]] = []

    def __init__(self, server: Served, buffer: int | None = None) -> None:
        self._socket = socket.socket()
        self.opened.append(self._socket)
        if buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self._socket.setblocking(False)
        self._port = server.port

    async def send(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            try:
                self._socket.getpeername()
            except OSError:
                await loop.sock_connect(self._socket, ("127.0.0.1", self._port))
        await loop.sock_sendall(self._socket, data)

    async def read(self) -> bytes:
        """Some bytes; b"" once the server has closed the connection."""
        async with asyncio.timeout(PATIENCE):
            try:
                return await asyncio.get_running_loop().sock_recv(self._socket, 1 << 16)
            except ConnectionResetError:
                return b""

    def reset(self) -> None:
        """Leave as a crashed program does."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()


@pytest.fixture(autouse=True)
def close_connections() -> Iterator[None]:
    yield
    while Client.opened:
        Client.opened.pop().close()


def chat(words: str, **more: Any) -> bytes:
    body = {"messages": [{"role": "user", "content": words}], **more}
    return request("/v1/chat/completions", body)


async def leave(server: Served, data: bytes, after: int) -> None:
    """Send a request from many clients, let the engine make some tokens, and reset them all."""
    clients = [Client(server) for _ in range(40)]
    for client in clients:
        await client.send(data)
    await until(lambda: len(server.engine.running) == 40)
    for _ in range(after):
        server.engine.step()
        await asyncio.sleep(0)
    for client in clients:
        client.reset()
    # No step is needed for their places to become free.
    await until(lambda: not server.engine.running)
    assert len(server.engine.left) == 40
    assert server.service.active == 0
    await until(lambda: server.service.metrics.failures["dropped"] == 40)


@pytest.mark.parametrize(
    "data",
    [
        chat("wait a long story", stream=True),
        request("/generate_stream", {"inputs": "wait a long story"}),
        request("/v1/completions", {"prompt": "wait a long story", "stream": True, "n": 3}),
    ],
    ids=["chat", "native", "several"],
)
async def test_h1_clients_that_leave_a_stream(socket_server: Served, data: bytes) -> None:
    await leave(socket_server, data, after=5)


@pytest.mark.parametrize(
    "data",
    [
        chat("wait a long story"),
        request("/generate", {"inputs": "wait a long story"}),
        request("/v1/completions", {"prompt": ["wait a long story"]}),
    ],
    ids=["chat", "native", "completion"],
)
async def test_h2_clients_that_leave_without_a_stream(socket_server: Served, data: bytes) -> None:
    await leave(socket_server, data, after=2)


async def test_h3_more_clients_than_places(model: Path) -> None:
    async with listening(model, max_concurrent_requests=64) as server:
        asks = [
            asyncio.create_task(server.chat("wait x", stream=bool(number % 2)))
            for number in range(200)
        ]
        await until(lambda: sum(task.done() for task in asks) == 136)
        assert {task.result().status_code for task in asks if task.done()} == {429}
        while server.engine.running:
            server.engine.step()
            await asyncio.sleep(0.001)
        codes = [(await task).status_code for task in asks]
        assert codes.count(200) == 64
        failures = server.service.metrics.failures
        assert failures == {"overloaded": 136}


async def test_h4_a_reader_that_never_reads(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SWEEP", 0.02)
    async with listening(model, stall_timeout=0.2) as server:
        assert server.running
        server.running.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        stalled = Client(server, buffer=4096)
        await stalled.send(chat("flood", stream=True, n=8))
        await until(lambda: server.engine.running != {})
        # It holds up nobody else, is cut off, and what it held is free again.
        assert (await server.chat("say hi")).status_code == 200
        await until(lambda: not server.engine.running)
        assert len(server.engine.left) == 1


async def test_h5_headers_that_dawdle(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "SWEEP", 0.02)
    async with listening(model, header_timeout=0.1) as server:
        silent, slow = Client(server), Client(server)
        await slow.send(b"GET /health HTTP/1.1\r\nHost: local")
        await silent.send(b"")
        assert await slow.read() == b""
        assert await silent.read() == b""
        # One that is being answered may take as long as the answer does.
        patient = Client(server)
        await patient.send(chat("wait abc", stream=True))
        await until(lambda: server.engine.running != {})
        again = Client(server)
        await again.send(b"GET /health HTT")
        assert await again.read() == b""
        assert server.engine.running != {}


async def test_h5_a_body_that_dawdles(model: Path) -> None:
    async with listening(model, body_timeout=0.1) as server:
        slow = Client(server)
        await slow.send(request("/generate", {"inputs": "say hi"})[:-3])
        assert (await slow.read()).startswith(b"HTTP/1.1 408")
        assert server.engine.requests == []
        gone = Client(server)
        await gone.send(request("/generate", {"inputs": "say hi"})[:-3])
        gone.reset()
        assert (await server.generate("say hi")).status_code == 200


async def test_a_silent_stream_says_that_it_is_alive(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "SWEEP", 0.02)
    async with listening(model, comment_after=0.05) as server:
        # Before the first token, when the status is not known yet, and after.
        for words in ("queue", "hang"):
            client = Client(server)
            await client.send(chat(words, stream=True))
            seen = b""
            while b": the server is alive\n\n" not in seen:
                seen += await client.read()
            assert seen.startswith(b"HTTP/1.1 200")
            client.reset()
        await until(lambda: not server.engine.running)


async def test_pipelined_requests_are_answered_in_order(socket_server: Served) -> None:
    client = Client(socket_server)
    await client.send(chat("say one") + chat("say two"))
    seen = b""
    while b"two" not in seen:
        seen += await client.read()
    assert seen.index(b"one") < seen.index(b"two")
    client.reset()
