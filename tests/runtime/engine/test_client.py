"""EngineClient on a real engine process: streams, refusals, and every way the process can end."""

import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest

from kvrun.errors import EngineDead, InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine import wire
from kvrun.runtime.engine.client import EngineClient
from kvrun.runtime.engine.request import Delta, Request
from kvrun.runtime.engine.start import start
from kvrun.runtime.sampling.params import SamplingParams
from tests.runtime.engine.scripted import drain

PARAMS = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)


def request(number: int, params: SamplingParams = PARAMS) -> Request:
    return Request(id=f"r{number}", prompt_ids=[5 + number, 7, 9], params=params)


@pytest.fixture
async def client(config: EngineConfig) -> AsyncIterator[EngineClient]:
    async with EngineClient(config) as client:
        yield client


async def collect(client: EngineClient, asked: Request) -> list[Delta]:
    return [delta async for delta in client.stream(asked)]


async def test_streams_are_what_the_engine_says_in_process(
    config: EngineConfig, client: EngineClient
) -> None:
    engine = start(config)
    for number in range(4):
        engine.add(request(number))
    expected = {name: tokens for (name, _), (tokens, _) in drain(engine).items()}
    streams = await asyncio.gather(*(collect(client, request(n)) for n in range(4)))
    found = {deltas[0].request_id: [t for d in deltas for t in d.token_ids] for deltas in streams}
    assert found == expected
    assert all(len(deltas) == 100 for deltas in streams), "a token does not wait for the next"


async def test_refused_requests_leave_the_others_alone(client: EngineClient) -> None:
    good = asyncio.create_task(collect(client, request(0)))
    with pytest.raises(InvalidRequest, match="128") as caught:
        await collect(client, Request(id="long", prompt_ids=[1] * 128, params=PARAMS))
    assert caught.value.hint
    with pytest.raises(InvalidRequest, match="vocabulary"):
        await collect(client, Request(id="ids", prompt_ids=[96], params=PARAMS))
    assert (await good)[-1].finish_reason == "length"


async def test_requests_that_cannot_be_sent_are_refused_here(client: EngineClient) -> None:
    good = asyncio.create_task(collect(client, request(0)))
    floats = Request(id="floats", prompt_ids=[1.5], params=PARAMS)  # type: ignore[list-item]
    surrogate = Request(id="s", prompt_ids=[1], params=PARAMS, adapter="\ud83d")
    for bad in (floats, surrogate):
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await collect(client, bad)
    assert (await good)[-1].finish_reason == "length"


async def test_an_id_can_be_used_again_at_once(client: EngineClient) -> None:
    whole = [t for d in await collect(client, request(0)) for t in d.token_ids]
    for _ in range(5):
        stream = client.stream(request(0))
        await anext(stream)
        await stream.aclose()
    again = await collect(client, request(0))
    assert [t for d in again for t in d.token_ids] == whole
    assert {d.request_id for d in again} == {"r0"}
    both = client.stream(request(0)), client.stream(request(0))
    await anext(both[0])
    with pytest.raises(InvalidRequest, match="running already"):
        await anext(both[1])
    await both[0].aclose()


async def test_leaving_a_stream_frees_its_pages(client: EngineClient) -> None:
    stream = client.stream(request(0))
    first = await anext(stream)
    assert first.token_ids
    await stream.aclose()
    other = await collect(client, request(1, SamplingParams(max_tokens=3, ignore_eos=True)))
    assert other[-1].finish_reason == "length"
    stats = await client.stats()
    assert (stats.running, stats.waiting, stats.blocks_active) == (0, 0, 0)
    assert stats.generated_tokens < 100


async def test_abort_ends_a_stream_with_its_reason(client: EngineClient) -> None:
    deltas = []
    async for delta in client.stream(request(0)):
        deltas.append(delta)
        if len(deltas) == 1:
            await client.abort("r0")
    assert deltas[-1].finish_reason == "abort"


async def test_a_killed_engine_is_an_error_for_everybody_waiting(config: EngineConfig) -> None:
    client = EngineClient(dataclasses.replace(config, restarts=0))
    await client.start()
    endless = dataclasses.replace(PARAMS, max_tokens=None)

    async def stream_until_the_end(number: int) -> KvrunError | None:
        try:
            async for _ in client.stream(request(number, endless)):
                started[number].set()
        except KvrunError as error:
            return error
        return None

    started = [asyncio.Event() for _ in range(8)]
    tasks = [asyncio.create_task(stream_until_the_end(n)) for n in range(8)]
    await started[0].wait()
    os.kill(client.pid, signal.SIGKILL)
    errors = [e for e in await asyncio.gather(*tasks) if e]
    assert errors, "all streams had ended before the engine was killed"
    assert all(isinstance(e, EngineDead) and "signal 9" in e.cause for e in errors)
    for call in (client.stats(), collect(client, request(99))):
        with pytest.raises(EngineDead):
            await call
    await client.close()


async def test_garbled_words_of_the_engine_end_every_wait(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = client.stream(request(0, dataclasses.replace(PARAMS, max_tokens=None)))
    await anext(stream)
    monkeypatch.setattr(wire, "from_engine", msgspec.msgpack.Decoder(int))
    with pytest.raises(EngineDead, match="garbled"):
        async for _ in stream:
            pass
    with pytest.raises(EngineDead):
        await client.stats()


async def test_the_engine_s_own_words_when_it_cannot_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    client = EngineClient(EngineConfig(model=str(tmp_path), load_format="dummy"))
    with pytest.raises(Unsupported, match="no_such_family") as caught:
        await client.start()
    assert "llama" in caught.value.hint
    await client.close()


async def test_ctrl_c_reaches_the_parent_only(client: EngineClient) -> None:
    os.kill(client.pid, signal.SIGINT)
    assert os.getpgid(client.pid) != os.getpgid(0)
    assert (await collect(client, request(0)))[-1].finish_reason == "length"


async def test_close_while_streaming(config: EngineConfig) -> None:
    client = EngineClient(config)
    await client.start()
    stream = client.stream(request(0, dataclasses.replace(PARAMS, max_tokens=None)))
    await anext(stream)
    await client.close()
    with pytest.raises(EngineDead, match="closed"):
        async for _ in stream:
            pass
    assert not psutil.pid_exists(client.pid)


def worker(config: EngineConfig, patch: str) -> "subprocess.Popen[bytes]":
    """An engine process in which `patch` has been run first, with the config sent."""
    script = f"from kvrun.runtime.engine import runner, worker\n{patch}\nworker.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin
    wire.send(process.stdin, config)
    wire.send(process.stdin, wire.Submit(request(0)))
    return process


def test_E4_an_engine_that_only_fails_says_so_and_exits_70(config: EngineConfig) -> None:
    patch = "def fail(*a): raise RuntimeError('no device')\nrunner.ModelRunner.submit = fail"
    with worker(config, patch) as process:
        assert process.stdout
        messages = [wire.from_engine.decode(frame) for frame in wire.frames(process.stdout)]
    assert isinstance(messages[0], wire.Started)
    assert isinstance(messages[-1], wire.Died)
    assert "no device" in messages[-1].fault.cause
    assert process.returncode == 70


def test_E9_a_step_that_hangs_ends_the_process_with_its_stacks(config: EngineConfig) -> None:
    patch = (
        "import threading\ndef hang(*a): threading.Event().wait()\nrunner.ModelRunner.submit = hang"
    )
    with worker(dataclasses.replace(config, step_timeout=0.2), patch) as process:
        assert process.stderr
        said = process.stderr.read().decode()
    assert process.returncode == 70
    assert "in hang" in said
    assert "longer than 0.2 s" in said.splitlines()[-1], "the last words are quoted to users"


def test_E9_native_code_that_keeps_the_interpreter_is_ended_too(config: EngineConfig) -> None:
    patch = (
        "import ctypes\n"
        "def hang(*a): ctypes.PyDLL(None).sleep(60)\n"
        "runner.ModelRunner.submit = hang"
    )
    with worker(dataclasses.replace(config, step_timeout=0.2), patch) as process:
        assert process.stderr
        said = process.stderr.read().decode()
    assert process.returncode == 1
    assert "in hang" in said


def test_S5_the_engine_ends_with_its_parent(config: EngineConfig) -> None:
    script = f"""
import asyncio, sys
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.client import EngineClient
from kvrun.runtime.engine.request import Request
from kvrun.runtime.sampling.params import SamplingParams

async def main():
    async with EngineClient(EngineConfig(**{dataclasses.asdict(config)!r})) as client:
        asked = Request(id="r", prompt_ids=[1], params=SamplingParams(ignore_eos=True))
        async for _ in client.stream(asked):
            print(client.pid, flush=True)
            sys.stdin.read()  # blocks the loop until the test kills this process

asyncio.run(main())
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine has outlived its parent"
        child_gone = psutil.wait_procs([child], timeout=0.1)[0]
        if child_gone:
            break
