"""peers.py beside a server like llama.cpp: what would make a figure a lie ends it."""

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType

import pytest

from kvrun.bench import workloads
from kvrun.bench.workloads import Workload
from kvrun.errors import InvalidRequest, KvrunError, Unreachable
from tests.bench.stub import Llama

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(FOLDER)
    import peers_servers

    return peers_servers


@pytest.fixture
async def llama() -> AsyncIterator[Llama]:
    async with Llama() as server:
        yield server


def find(name: str) -> Workload:
    lengths, count = name.split("x")
    return workloads.find(lengths, count=int(count))


async def turns(server: object, *names: str) -> None:
    for name in names:
        await asyncio.to_thread(server, name)  # type: ignore[arg-type]


async def test_a_server_that_loads_is_waited_for(
    servers: ModuleType, llama: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    llama.loading = 2
    [one] = servers.named([f"llama.cpp={llama.url}"], find)
    assert await asyncio.to_thread(one.ready, 4096) is True
    assert one.model == "/models/tiny-f32.gguf"
    assert capsys.readouterr().err == "llama.cpp: it is not ready yet; waiting\n"


async def test_one_that_takes_no_ids_is_asked_in_words(servers: ModuleType, llama: Llama) -> None:
    llama.takes_ids = False
    [one] = servers.named([f"ollama={llama.url}"], find)
    assert await asyncio.to_thread(one.ready, 4096) is False
    await turns(one, "8/4x2")
    assert [len(body["prompt"].split()) for body in llama.bodies[-2:]] == [8, 8]
    assert one.record() == {
        "model": "tiny-f32.gguf", "prompts_as": "text", "prompt_tokens": {"8/4x2": 18},
    }  # fmt: skip


async def test_one_that_is_not_there_is_not_waited_for(servers: ModuleType) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    [one] = servers.named([f"llama.cpp={url}"], find)
    with pytest.raises(Unreachable, match="no answer from"):
        await asyncio.to_thread(one.ready, 4096)


async def test_one_that_refuses_everything(servers: ModuleType, llama: Llama) -> None:
    llama.context = 2
    [one] = servers.named([f"llama.cpp={llama.url}"], find)
    with pytest.raises(InvalidRequest, match="has no room"):
        await asyncio.to_thread(one.ready, 4096)


async def test_our_own_that_has_died_says_why(servers: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("no memory\n")
    died = subprocess.Popen([sys.executable, "-c", "raise SystemExit(4)"])
    died.wait()
    one = servers.Server("kvrun", "http://127.0.0.1:9", find, died, log)
    with pytest.raises(SystemExit, match="kvrun has ended with code 4\nno memory"):
        await asyncio.to_thread(one.ready, 4096)


async def test_every_server_reads_the_same_and_none_twice(
    servers: ModuleType, llama: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = servers.named([f"a={llama.url}", f"b={llama.url}"], find)
    for one in pair:
        one.vocab = 300
        await turns(one, "16/4x3", "16/4x3")
    asked = [tuple(body["prompt"]) for body in llama.bodies]
    assert sorted(asked[:6]) == sorted(asked[6:])
    assert len(set(asked[:6])) == 6
    assert max(map(max, asked)) < 300
    assert all(body["ignore_eos"] and body["max_tokens"] == 4 for body in llama.bodies)
    assert servers.unlike(pair) == []
    pair[1].read["16/4x3"] += 1
    assert servers.unlike(pair) == ["16/4x3: tokens of the prompts are 48 for a, 49 for b"]
    assert capsys.readouterr().err == ""


def test_prompts_of_a_fixed_protocol_are_renewed_too(servers: ModuleType) -> None:
    mixed = workloads.find("mixed256")
    one, other = (servers.renewed(mixed, turn, 4096) for turn in (1, 2))
    assert one == servers.renewed(mixed, 1, 4096)
    assert [*map(len, one.prompts)] == [*map(len, other.prompts)] == [*map(len, mixed.prompts)]
    assert not {*map(tuple, one.prompts)} & {*map(tuple, other.prompts)}
    words = Workload("file", ["as it is", [1, 2]], [3, 3])
    assert servers.renewed(words, 1, 4096).prompts[0] == "as it is"


async def test_answers_cut_short_end_the_comparison(servers: ModuleType, llama: Llama) -> None:
    """llama.cpp cuts its context into one part for each slot, and says nothing."""
    [one] = servers.named([f"llama.cpp={llama.url}"], find)
    one.vocab = 4096
    with pytest.raises(SystemExit, match="48 tokens came of 60 asked for; its context has no room"):
        await turns(one, "40/30x2")


async def test_prompts_that_are_too_long_end_it(servers: ModuleType, llama: Llama) -> None:
    [one] = servers.named([f"llama.cpp={llama.url}"], find)
    one.vocab = 4096
    with pytest.raises(SystemExit) as ended:
        await turns(one, "70/30x2")
    first, second = str(ended.value.code).splitlines()
    assert first == f"llama.cpp at {llama.url}, 70/30x2: 2 of 2 requests failed"
    assert second.startswith("failed 2 times: HTTP 400: request (70 tokens) exceeds the available")


async def test_what_cannot_be_checked_is_said_once(
    servers: ModuleType, llama: Llama, capsys: pytest.CaptureFixture[str]
) -> None:
    [one] = servers.named([f"llama.cpp={llama.url}"], find)
    one.vocab, llama.counts = 4096, False
    await turns(one, "16/4x2", "16/4x2")
    err = capsys.readouterr().err
    assert "llama.cpp: it does not count tokens" in err
    assert err.count("\n") == 1
    llama.counts, llama.cached = True, 15
    await turns(one, "16/4x2")
    assert "it had 30 of 32 prompt tokens already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1:8080", "=http://h", "a=", "kvrun=h:1", "a=ftp://h"]
)
def test_what_is_no_server(servers: ModuleType, text: str) -> None:
    with pytest.raises(KvrunError):
        servers.named([text], find)
    with pytest.raises(KvrunError):
        servers.named(["a=h:1", "a=h:2"], find)


async def test_the_program(llama: Llama, tmp_path: Path) -> None:
    """As it is started: kvrun's own server on the built-in model, and one more."""
    llama.context, record = 256, tmp_path / "record.json"
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(FOLDER / "peers.py"), "--server", f"llama.cpp={llama.url}",
        "-w", "16/4x2", "12/1x3", "--turns", "1", "--json", str(record),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=FOLDER.parent,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode == 0, err
    assert err.decode().splitlines() == [
        "kvrun: ready with tiny; prompts are ids",
        "llama.cpp: ready with tiny-f32.gguf; prompts are ids",
    ]
    assert [line.split()[:2] for line in out.decode().splitlines()] == [
        [work, peer] for work in ("16/4x2", "12/1x3") for peer in ("kvrun", "llama.cpp")
    ]
    found = json.loads(record.read_text())["servers"]
    assert found["kvrun"]["prompt_tokens"] == found["llama.cpp"]["prompt_tokens"]
    assert found["kvrun"]["prompt_tokens"] == {"16/4x2": 32, "12/1x3": 36}
