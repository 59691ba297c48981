"""Row E6: the engine process dies, another one goes on, and nobody who waits can tell."""

import asyncio
import dataclasses
import os
import signal
from collections.abc import Iterable

import msgspec
import pytest
import torch

from kvrun import LLM
from kvrun.errors import EngineDead, KvrunError
from kvrun.hub.local import adapters_of, resolve
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine import runner, wire
from kvrun.runtime.engine.client import EngineClient
from kvrun.runtime.engine.faults import of_device
from kvrun.runtime.engine.request import Delta, Ready, Request
from kvrun.runtime.engine.stream import MAX_DEATHS, Loaded, Stream
from kvrun.runtime.sampling.params import SamplingParams
from tests.runtime.engine.test_client import PARAMS, collect, request, worker

PROMPT = [5, 17, 300, 42, 8, 9]
GREEDY = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
WARM = SamplingParams(max_tokens=60, temperature=0.9, ignore_eos=True, seed=7)
ASKED = {
    "greedy": (GREEDY, None),
    "adapter": (GREEDY, "mine"),
    "seeded": (WARM, None),
    "several": (dataclasses.replace(WARM, n=3, top_p=0.9), None),
    "penalties": (
        dataclasses.replace(
            WARM, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2
        ),
        None,
    ),
    "ends": (dataclasses.replace(WARM, ignore_eos=False, min_tokens=30, stop_token_ids=(9,)), None),
    "logprobs": (dataclasses.replace(GREEDY, logprobs=2, prompt_logprobs=1), None),
}


def asked() -> list[Request]:
    return [
        Request(id=name, prompt_ids=PROMPT, params=params, adapter=adapter)
        for name, (params, adapter) in ASKED.items()
    ]


def told(deltas: Iterable[Delta]) -> dict[int, tuple[list[int], str | None]]:
    """Each choice's tokens, and why it has ended."""
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, str | None] = {}
    for delta in deltas:
        tokens.setdefault(delta.index, []).extend(delta.token_ids)
        assert reasons.get(delta.index) is None, "nothing comes behind the end"
        reasons[delta.index] = delta.finish_reason
    return {index: (ids, reasons[index]) for index, ids in tokens.items()}


async def killed(client: EngineClient, requests: list[Request], after: int) -> list[list[Delta]]:
    """All answers; the engine is killed once each has `after` tokens."""
    found: list[list[Delta]] = [[] for _ in requests]
    begun = asyncio.Semaphore(0)

    async def read(place: int) -> None:
        async for delta in client.stream(requests[place]):
            found[place].append(delta)
            if len(found[place]) == after:
                begun.release()

    async def kill() -> None:
        for _ in requests:
            await begun.acquire()
        os.kill(client.pid, signal.SIGKILL)

    await asyncio.gather(kill(), *(read(place) for place in range(len(requests))))
    return found


async def test_E6_answers_go_on_as_if_nothing_had_happened() -> None:
    config = EngineConfig(
        model=str(resolve("tiny")), device="cpu", dtype="float32", threads=1, kv_tokens=4096
    )
    news: list[KvrunError | Ready] = []
    async with EngineClient(config) as client:
        client.on_restart = news.append
        await client.load_adapter("mine", adapters_of("tiny")["pirate"])
        whole = await asyncio.gather(*(collect(client, one) for one in asked()))
        pid = client.pid
        found = await killed(client, asked(), after=4)
        for before, after in zip(whole, found, strict=True):
            assert told(after) == told(before), before[0].request_id
        pairs = zip(whole[-1], found[-1], strict=True)
        for plain, resumed in pairs:
            values = [
                [(entry.token_id, entry.logprob) for entry in delta.logprobs or []]
                for delta in (plain, resumed)
            ]
            assert values[0][0][0] == values[1][0][0]
            assert values[0][0][1] == pytest.approx(values[1][0][1], abs=1e-4)
        assert [len(d.prompt_logprobs or []) for d in found[-1]] == [5] + [0] * 59
        dead, ready = news
        assert isinstance(dead, EngineDead)
        assert "signal 9" in dead.cause
        assert isinstance(ready, Ready)
        assert client.pid != pid
        assert [info.name for info in await client.adapters()] == ["mine"]
        stats = await client.stats()
        assert (stats.restarts, stats.running, stats.blocks_active) == (1, 0, 0)
        # Nothing was computed twice but what was lost, and nothing was asked for again.
        assert stats.generated_tokens < sum(len(deltas) for deltas in found)


async def test_who_comes_or_leaves_while_the_engine_is_started_again(config: EngineConfig) -> None:
    async with EngineClient(config) as client:
        whole = [told(await collect(client, request(n))) for n in range(2)]
        pair = dataclasses.replace(PARAMS, n=2)
        leaving, staying = client.stream(request(2)), client.stream(request(3, pair))
        seen = [await anext(staying)]
        await anext(leaving)
        down = asyncio.Event()
        client.on_restart = lambda news: down.set()
        os.kill(client.pid, signal.SIGKILL)
        await down.wait()
        new = [asyncio.create_task(collect(client, request(n))) for n in range(2)]
        stats, adapters = (
            asyncio.create_task(call) for call in (client.stats(), client.adapters())
        )
        await leaving.aclose()
        await client.abort("r3", 1)
        seen += [delta async for delta in staying]
        assert [told(await task) for task in new] == whole
        assert (await stats).restarts == 1
        assert await adapters == []
        ended = told(seen)
        assert (len(ended[0][0]), ended[0][1]) == (100, "length")
        assert ended[1][1] == "abort"
        assert len(ended[1][0]) < 100
        assert (await client.stats()).blocks_active == 0


async def test_an_engine_that_keeps_dying_is_given_up(config: EngineConfig) -> None:
    client = EngineClient(dataclasses.replace(config, restarts=1))
    await client.start()
    client.on_restart = lambda news: os.kill(client.pid, signal.SIGKILL)
    stream = client.stream(request(0))
    await anext(stream)
    os.kill(client.pid, signal.SIGKILL)
    with pytest.raises(EngineDead, match="ended") as caught:
        async for _ in stream:
            pass
    assert "signal 9; it had been started again 1 times" in caught.value.cause
    assert (await client.ended()) is caught.value
    with pytest.raises(EngineDead):
        await collect(client, request(1))
    await client.close()


async def test_closing_while_the_engine_is_started_again(config: EngineConfig) -> None:
    client = EngineClient(config)
    await client.start()
    down = asyncio.Event()
    client.on_restart = lambda news: down.set()
    os.kill(client.pid, signal.SIGKILL)
    await down.wait()
    await client.close()
    assert "closed" in (await client.ended()).what


DIED = EngineDead("the engine process has ended.", cause="it was killed by signal 11")


async def test_a_request_that_is_there_whenever_engines_die_is_not_tried_for_ever() -> None:
    stream = Stream(request(0), {})
    for _ in range(MAX_DEATHS - 1):
        stream.deaths += 1
        assert stream.lost({}, DIED) is None
    stream.deaths += 1
    error = stream.lost({}, DIED)
    assert error
    assert f"{MAX_DEATHS} times" in error.what
    assert "signal 11" in error.cause
    stream.fail(error)
    assert list(stream.resume()) == []


async def test_no_answer_goes_on_with_another_adapter() -> None:
    one, other = Loaded("/a", 1), Loaded("/a", 2)
    asked = msgspec.structs.replace(request(0), adapter=[("x", 1.0), ("y", 0.5)])
    stream = Stream(asked, {"x": one, "y": one})
    assert stream.lost({"x": one, "y": one, "z": other}, DIED) is None
    for now in ({"x": one, "y": other}, {"x": one}):
        error = stream.lost(now, DIED)
        assert error
        assert "'y'" in error.cause


def test_E6_a_lost_device_ends_the_process_at_the_first_step(config: EngineConfig) -> None:
    patch = (
        "import torch\ncalls = []\n"
        "def fail(*a):\n"
        "    calls.append(1); print('steps', len(calls), file=__import__('sys').stderr)\n"
        "    raise torch.AcceleratorError('CUDA error: device-side assert triggered')\n"
        "runner.ModelRunner._run = fail"
    )
    with worker(config, patch) as process:
        assert process.stdout
        assert process.stderr
        messages = [wire.from_engine.decode(frame) for frame in wire.frames(process.stdout)]
        said = process.stderr.read().decode()
    died = messages[-1]
    assert isinstance(died, wire.Died)
    assert died.fault.what == "the device has failed."
    assert "device-side assert" in died.fault.cause
    assert said.count("steps") == 1, "nothing is retried in this process"
    assert process.returncode == 70


def test_which_errors_of_a_device_are_final() -> None:
    def of(error: Exception, code: int | None = None) -> type[BaseException]:
        if code is not None:
            error.error_code = code  # type: ignore[attr-defined]
        try:
            with of_device():
                raise error
        except BaseException as told:
            return type(told)

    lost = "Triton Error [CUDA]: an illegal memory access was encountered"
    assert of(torch.AcceleratorError("CUDA error"), 700) is EngineDead
    assert of(torch.AcceleratorError("CUDA error"), 2) is MemoryError
    assert of(torch.AcceleratorError("CUDA error"), 9) is torch.AcceleratorError
    assert of(torch.OutOfMemoryError("too much")) is MemoryError
    assert of(RuntimeError(lost)) is EngineDead
    assert of(RuntimeError("Triton Error [CUDA]: out of resource")) is RuntimeError
    assert of(RuntimeError("shapes differ")) is RuntimeError


def test_in_process_it_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with LLM("tiny", dtype="float32") as llm:
        monkeypatch.setattr(runner.ModelRunner, "_run", fail)
        with pytest.raises(EngineDead, match="device has failed") as caught:
            llm.generate([PROMPT], GREEDY)
    assert "illegal memory access" in caught.value.cause
    assert "new process" in caught.value.hint
