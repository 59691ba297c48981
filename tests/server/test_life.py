"""Rows S1 to S3 and S6 to S10 of the fault matrix: starting, ending, and a machine that fails."""

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from kvrun.errors import EngineDead, KvrunError
from kvrun.server.run import bind
from tests.server.conftest import PATIENCE, events, listening, until
from tests.server.engine import FakeEngine

ROOT = Path(__file__).parents[2]
ENGINE = Path(__file__).with_name("engine.py")


async def test_s1_a_drain_lets_answers_finish(model: Path) -> None:
    async with listening(model) as server:
        assert server.running
        assert server.ended
        streams = [
            asyncio.create_task(server.chat("wait hello", stream=bool(number % 2)))
            for number in range(8)
        ]
        await until(lambda: len(server.engine.running) == 8)
        server.running.tell(signal.SIGTERM)
        await until(lambda: server.service.phase == "draining")
        assert (await server.http.get("/readyz")).status_code == 503
        refused = await server.chat("say hi")
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        while server.engine.running:
            server.engine.step()
            await asyncio.sleep(0.001)
        for number, stream in enumerate(streams):
            answer = await stream
            assert answer.status_code == 200
            if number % 2:
                assert events(answer.text)[-1] == "[DONE]"
        assert await server.ended == 0
        assert server.engine.closed


async def test_s2_a_drain_that_takes_too_long(model: Path) -> None:
    async with listening(model, drain_timeout=0.1) as server:
        assert server.running
        assert server.ended
        streamed = asyncio.create_task(server.chat("hang", stream=True))
        native = asyncio.create_task(
            server.post("/generate_stream", {"inputs": "hang", "parameters": {"details": True}})
        )
        whole = asyncio.create_task(server.chat("hang"))
        await until(lambda: len(server.engine.running) == 3)
        server.running.tell(signal.SIGTERM)
        *_, last, done = events((await streamed).text)
        assert last["choices"][0]["finish_reason"] == "abort"
        assert done == "[DONE]"
        assert events((await native).text)[-1]["error_type"] == "incomplete_generation"
        assert (await whole).status_code == 503
        assert await server.ended == 0


async def test_s3_told_twice(model: Path) -> None:
    async with listening(model) as server:
        assert server.running
        assert server.ended
        stream = asyncio.create_task(server.chat("hang", stream=True))
        await until(lambda: server.engine.running != {})
        server.running.tell(signal.SIGTERM)
        await until(lambda: server.service.phase == "draining")
        server.running.tell(signal.SIGTERM)
        assert await server.ended == 128 + signal.SIGTERM
        assert server.engine.closed
        assert server.engine.running == {}
        with pytest.raises(httpx2.HTTPError):
            await stream


async def test_told_to_end_while_the_model_loads(model: Path) -> None:
    async with listening(model, device="cuda:7") as server:
        assert server.running
        assert server.ended
        assert (await server.http.get("/health")).status_code == 503
        server.running.tell(signal.SIGTERM)
        assert await server.ended == 0
        assert server.engine.closed


async def test_the_engine_dies(model: Path) -> None:
    async with listening(model) as server:
        assert server.ended
        waiting = asyncio.create_task(server.chat("queue"))
        await until(lambda: server.engine.running != {})
        answer = await server.chat("die", stream=True)
        error = events(answer.text)[-2]["error"]
        assert error["message"] == "The engine has ended."
        assert error["http_status_code"] == 503
        assert events(answer.text)[-1] == "[DONE]"
        assert (await server.http.get("/healthz")).status_code == 503
        assert (await server.http.get("/health")).status_code == 503
        await waiting
        with pytest.raises(EngineDead):
            await server.ended


async def test_s8_the_clock_jumps(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with listening(model) as server:
        stream = asyncio.create_task(server.chat("wait abc", stream=True))
        await until(lambda: server.engine.running != {})
        real = time.time
        for jump in (3600, -3600):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            server.engine.step()
            assert (await server.http.get("/version")).status_code == 200  # which is logged
        while server.engine.running:
            server.engine.step()
            await asyncio.sleep(0.001)
        assert events((await stream).text)[-1] == "[DONE]"


def test_s6_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(KvrunError, match=str(port)) as error:
            bind("127.0.0.1", port)
        assert error.value.exit_code == 1


async def test_answers_do_not_wait_for_acknowledgements(model: Path) -> None:
    async with listening(model) as server:
        assert server.running
        (await server.chat("say hi")).raise_for_status()
        (connection,) = server.running.connections
        sock = connection.transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- as a process -----------------------------------------------------------------------------


class Process:
    """`kvrun serve` on the fake engine, in a process of its own."""

    def __init__(self, process: "asyncio.subprocess.Process", port: int, log: Path) -> None:
        self.process = process
        self.http = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
        self.port = port
        self.log = log

    async def metric(self, name: str) -> float:
        text = (await self.http.get("/metrics")).text
        return float(next(li for li in text.splitlines() if li.startswith(f"{name} ")).split()[1])


@asynccontextmanager
async def process(
    model: Path, tmp_path: Path, *words: str, shell: str = '"$@"', **options: Any
) -> AsyncIterator[Process]:
    """`shell` runs the command "$@" and says where its streams go."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [sys.executable, str(ENGINE), "serve", str(model), "--port", str(port), *words]
    with log.open("wb") as stderr:
        started = await asyncio.create_subprocess_exec(
            "sh", "-c", f"exec {shell}", "sh", *command,
            env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=stderr, **options,
        )  # fmt: skip
    one = Process(started, port, log)
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    if (await one.http.get("/health")).status_code == 200:
                        break
                except httpx2.TransportError:
                    await asyncio.sleep(0.02)
        yield one
    finally:
        if started.returncode is None:
            started.kill()
        await started.wait()
        await one.http.aclose()


async def test_s1_by_a_real_signal(model: Path, tmp_path: Path) -> None:
    async with process(model, tmp_path, "--json-output") as one:
        body = {"prompt": "flood", "stream": True, "max_tokens": 200}
        async with one.http.stream("POST", "/v1/completions", json=body) as answer:
            one.process.send_signal(signal.SIGTERM)
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]"
        assert await one.process.wait() == 0
        log = one.log.read_text()
        assert '"message": "draining"' in log
        assert "flood" not in log  # prompts are nobody's business
        assert "Traceback" not in log


async def test_s3_ctrl_c_twice(model: Path, tmp_path: Path) -> None:
    async with process(model, tmp_path) as one:
        body = {"prompt": "hang", "stream": True}
        async with one.http.stream("POST", "/v1/completions", json=body):
            one.process.send_signal(signal.SIGINT)
            while (await one.http.get("/readyz")).status_code != 503:
                pass
            one.process.send_signal(signal.SIGINT)
            assert await one.process.wait() == 130
        assert "Traceback" not in one.log.read_text()


async def test_s9_a_log_that_cannot_be_written(model: Path, tmp_path: Path) -> None:
    async with process(model, tmp_path, shell='"$@" 2>/dev/full') as one:
        assert (await one.http.post("/generate", json={"inputs": "say hi"})).status_code == 200
        assert await one.metric("kvrun_log_errors_total") >= 2


async def test_s9_no_stderr_at_all(model: Path, tmp_path: Path) -> None:
    async with process(model, tmp_path, shell='"$@" 2>&-') as one:
        answer = await one.http.post("/generate", json={"inputs": "say hi"})
        assert answer.json() == {"generated_text": "hi"}
        assert await one.metric("kvrun_log_errors_total") >= 2


async def test_s10_no_more_connections(model: Path, tmp_path: Path) -> None:
    few = 40

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))

    async with process(model, tmp_path, preexec_fn=limit) as one:
        opened = []
        for _ in range(2 * few):
            _, writer = await asyncio.open_connection("127.0.0.1", one.port)
            opened.append(writer)
        for writer in opened[few // 2 :]:
            writer.close()
        answer = await one.http.post("/generate", json={"inputs": "say hi"})
        assert answer.json() == {"generated_text": "hi"}
        for writer in opened:
            writer.close()
        # It tries again once a second, and says so in a line or a few.
        log = one.log.read_text()
        assert "out of system resource" in log
        assert log.count("\n") < 200


def kvrun(*words: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, str(ENGINE), "serve", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    return done.returncode, done.stderr


def test_s6_before_anything_loads(model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, said = kvrun(str(model), "--port", port, "--device", "cuda:7")
    assert code == 1
    assert port in said
    assert "listening" not in said


def test_s7_a_public_address_without_a_key(model: Path) -> None:
    code, said = kvrun(str(model), "--hostname", "0.0.0.0", "--port", "0")
    assert code == 2
    assert "without a key" in said
    assert FakeEngine.made == []
