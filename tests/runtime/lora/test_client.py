"""Adapters through the pipe and through LLM: load, use, unload, and what is told when not."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from kvrun import LLM, SamplingParams
from kvrun.errors import EngineDead, InvalidRequest, NotFound
from kvrun.hub.local import adapters_of, resolve_adapter
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.client import EngineClient
from kvrun.runtime.engine.request import Request

Make = Callable[..., EngineConfig]
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
TINY = adapters_of("tiny")


def ask(name: str, adapter: object, **params: int) -> Request:
    options = SamplingParams(temperature=0, ignore_eos=True, **{"max_tokens": 8, **params})
    return Request(id=name, prompt_ids=[5, 6, 7, 8], params=options, adapter=adapter)  # type: ignore[arg-type]


async def tokens(client: EngineClient, request: Request) -> list[int]:
    return [i async for delta in client.stream(request) for i in delta.token_ids]


async def test_through_the_pipe(config: Make, adapters: dict[str, str], tmp_path: Path) -> None:
    async with EngineClient(config(adapters={"one": adapters["one"]}, restarts=0)) as client:
        assert [info.name for info in await client.adapters()] == ["one"]
        streaming = asyncio.create_task(tokens(client, ask("long", "one", max_tokens=100)))
        info = await client.load_adapter("eight", adapters["eight"])
        assert (info.name, info.ranks) == ("eight", [8])
        found = await asyncio.gather(
            tokens(client, ask("a", "eight")), tokens(client, ask("b", None)),
            tokens(client, ask("c", [("eight", 0.5), ("one", 1.0)])),
        )  # fmt: skip
        assert len({tuple(f) for f in found}) == 3
        with pytest.raises(NotFound, match="holds no adapter_config"):
            await client.load_adapter("broken", str(tmp_path))
        with pytest.raises(InvalidRequest, match="there is no adapter 'broken'"):
            await tokens(client, ask("d", "broken"))
        with pytest.raises(InvalidRequest, match="cannot be sent"):
            await client.load_adapter("\ud83d", adapters["eight"])
        await client.unload_adapter("eight")
        with pytest.raises(InvalidRequest, match="known: one"):
            await client.unload_adapter("eight")
        assert len(await streaming) == 100
        assert [info.running for info in await client.adapters()] == [0]
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(EngineDead):
            await client.load_adapter("eight", adapters["eight"])
        with pytest.raises(EngineDead):
            await client.adapters()


def test_through_llm(tmp_path: Path) -> None:
    text = "How many users are there?"
    messages = [{"role": "user", "content": text}]
    with LLM("tiny", dtype="float32", adapters={"arr": TINY["pirate"]}) as llm:
        assert [info.name for info in llm.adapters()] == ["json", "pirate", "sql", "arr"]
        several = llm.chat([messages] * 4, GREEDY, adapter=["sql", None, "pirate", "arr"])
        answers = [o.token_ids for o in several]
        assert answers[2] == answers[3]
        assert len({tuple(a) for a in answers}) == 3
        alone = [llm.chat(messages, GREEDY, adapter=a)[0] for a in ("sql", None, "arr")]
        assert [o.token_ids for o in alone] == [answers[0], answers[1], answers[3]]
        ids = several[0].prompt_token_ids
        assert llm.generate([ids, ids], GREEDY, adapter="sql")[1].token_ids == answers[0]
        streamed = [i for d in llm.stream(ids, GREEDY, adapter="sql") for i in d.token_ids]
        assert streamed == answers[0]
        both = llm.generate(ids, GREEDY, adapter=[("sql", 1.0), ("pirate", 0.0)])
        assert both[0].token_ids == answers[0]
        info = llm.load_adapter("mine", TINY["sql"])
        assert info.ranks == [16]
        assert llm.generate(ids, GREEDY, adapter="mine")[0].token_ids == answers[0]
        llm.unload_adapter("mine")
        for wrong in ("mine", ["mine"], ["sql", "sql"]):
            with pytest.raises(InvalidRequest):
                llm.generate(ids, GREEDY, adapter=wrong)
        with pytest.raises(NotFound, match="there is no adapter"):
            llm.load_adapter("mine", "nowhere")
        assert llm.stats().running == llm.stats().waiting == 0


def test_names_of_adapters(tmp_path: Path) -> None:
    assert list(TINY) == ["json", "pirate", "sql"]
    assert adapters_of("something/else") == {}
    assert resolve_adapter("tiny", "sql") == Path(TINY["sql"])
    assert resolve_adapter("other", TINY["sql"]) == Path(TINY["sql"])
    with pytest.raises(NotFound, match="no LoRA adapter") as caught:
        resolve_adapter("tiny", str(tmp_path))
    assert "adapter_config.json" in caught.value.cause
    with pytest.raises(NotFound) as caught:
        resolve_adapter("other", "sql")
    assert "built in" not in caught.value.hint
