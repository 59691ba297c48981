"""kvrun serve on the real engine and the built-in model: the pieces fit together."""

import asyncio
import base64
import json
import math
import os
import re
import shutil
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from kvrun.hub.local import resolve
from kvrun.runtime.text import Text
from tests.runtime.lora.adapters import edit
from tests.server.conftest import events

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tiny"
TEXT = Text(resolve("tiny"))
ADAPTED = json.loads((GOLDEN / "adapters.json").read_text())
ADMIN = {"Authorization": "Bearer root"}
PATIENCE = 60.0


class Server:
    def __init__(self, port: int, process: asyncio.subprocess.Process, folder: Path) -> None:
        self.port = port
        self.folder = folder  # where adapters may come from
        self.process = process
        self.http = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)

    async def blocks_in_use(self) -> int:
        text = (await self.http.get("/metrics")).text
        found = re.search(r"^kvrun_kv_blocks_used (\d+)", text, re.MULTILINE)
        assert found
        return int(found[1])

    async def until_free(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while await self.blocks_in_use():
                pass


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    folder = tmp_path_factory.mktemp("adapters")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "importtime", "-m", "kvrun", "serve", "-p", str(port),
        "--threads", "1", "--max-batch-total-tokens", "20000", "--admin-key", "root",
        "--lora-folder", str(folder),
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=asyncio.subprocess.PIPE, limit=1 << 22,
    )  # fmt: skip
    server = Server(port, process, folder)
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                if (await server.http.get("/health")).status_code == 200:
                    break
            except httpx2.TransportError:
                await asyncio.sleep(0.05)
    yield server
    await server.http.aclose()
    process.send_signal(signal.SIGTERM)
    _, log = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in log
    loaded = set(re.findall(r"\|\s+(\w+)$", log.decode(), re.MULTILINE))
    assert "fastapi" in loaded
    # The process that talks to clients never computes.
    assert not loaded & {"torch", "transformers", "huggingface_hub", "numpy", "typer_cli"}


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_golden_answers_over_http(tiny: Server) -> None:
    records = json.loads((GOLDEN / "chat.json").read_text())[:4]
    bodies = [
        {"messages": record["messages"], "temperature": 0, "max_tokens": len(record["output_ids"])}
        for record in records
    ]
    answers = await asyncio.gather(
        *(tiny.http.post("/v1/chat/completions", json=body) for body in bodies)
    )
    for record, answer in zip(records, answers, strict=True):
        assert answer.json()["choices"][0]["message"]["content"] == TEXT.decode(
            record["output_ids"]
        )


async def test_dialects_and_streams_agree(tiny: Server) -> None:
    prompt = "Once upon a time"
    native = {"inputs": prompt, "parameters": {"max_new_tokens": 12, "details": True}}
    openai = {"prompt": prompt, "max_tokens": 12, "temperature": 0}
    one = (await tiny.http.post("/generate", json=native)).json()
    two = events((await tiny.http.post("/generate_stream", json=native)).text)
    three = (await tiny.http.post("/v1/completions", json=openai)).json()
    four = events((await tiny.http.post("/v1/completions", json=openai | {"stream": True})).text)
    text = one["generated_text"]
    assert text
    assert two[-1]["generated_text"] == text == three["choices"][0]["text"]
    assert "".join(event["choices"][0]["text"] for event in four[:-1]) == text
    assert [event["token"] for event in two] == one["details"]["tokens"]


async def test_a_stop_text_inside_a_token(tiny: Server) -> None:
    parameters = {"max_new_tokens": 12, "stop": ["im"], "details": True}
    body = {"inputs": "Once upon", "parameters": parameters}
    found = events((await tiny.http.post("/generate_stream", json=body)).text)
    whole = (await tiny.http.post("/generate", json=body)).json()
    assert whole["generated_text"] == " a tim" == found[-1]["generated_text"]
    assert "".join(event["token"]["text"] for event in found) == " a tim"
    assert [event["token"] for event in found] == whole["details"]["tokens"]
    assert whole["details"]["finish_reason"] == "stop_sequence"


async def test_the_chances_of_a_prompt(tiny: Server) -> None:
    prompt = "Once upon a time"
    native = {"inputs": prompt, "parameters": {"max_new_tokens": 1, "decoder_input_details": True}}
    openai = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    prefill = (await tiny.http.post("/generate", json=native)).json()["details"]["prefill"]
    told = (await tiny.http.post("/v1/completions", json=openai)).json()["choices"][0]["logprobs"]
    assert told["tokens"][:3] == ["<|bos|>", "Once", " upon"]
    assert told["text_offset"][:3] == [0, 0, len("Once")]
    values = [token["logprob"] for token in prefill]
    assert values == told["token_logprobs"]
    assert values[0] is None
    assert sum(values[1:]) < -1
    assert all(value < 0 for value in values[1:])


async def test_a_seed_repeats_over_http(tiny: Server) -> None:
    body = {"prompt": "Tell me", "max_tokens": 16, "temperature": 2, "seed": 7, "n": 2}
    first = (await tiny.http.post("/v1/completions", json=body)).json()["choices"]
    again = (await tiny.http.post("/v1/completions", json=body)).json()["choices"]
    assert first == again
    assert first[0]["text"] != first[1]["text"]


async def test_h1_h2_pages_come_back_when_clients_leave(tiny: Server) -> None:
    for stream in (True, False):
        body = {
            "prompt": "Once upon a time", "stream": stream, "ignore_eos": True, "n": 4,
            "temperature": 1,
        }  # fmt: skip
        asks = [asyncio.create_task(tiny.http.post("/v1/completions", json=body)) for _ in range(8)]
        while not await tiny.blocks_in_use():
            pass
        for ask in asks:
            ask.cancel()
        await asyncio.gather(*asks, return_exceptions=True)
        await tiny.until_free()


async def test_h4_pages_come_back_although_nobody_reads(tiny: Server) -> None:
    body = json.dumps(
        {"prompt": "Once", "stream": True, "ignore_eos": True, "max_tokens": 150, "n": 2,
         "stream_options": {"continuous_usage_stats": True}}
    ).encode()  # fmt: skip
    _, writer = await asyncio.open_connection("127.0.0.1", tiny.port, limit=1)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    await writer.drain()
    while not await tiny.blocks_in_use():
        pass
    await tiny.until_free()  # the engine has finished; it never waits for a reader
    writer.transport.abort()


async def test_context_and_limits_are_the_models(tiny: Server) -> None:
    info = (await tiny.http.get("/info")).json()
    config = json.loads((resolve("tiny") / "config.json").read_text())
    assert info["max_total_tokens"] == config["max_position_embeddings"]
    assert info["max_batch_total_tokens"] == 20_000
    answer: Any = await tiny.http.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": info["max_total_tokens"]}
    )
    assert answer.json()["error"]["code"] == "context_length_exceeded"


# -- adapters -----------------------------------------------------------------------------------


async def load(server: Server, name: str, path: str, **more: Any) -> httpx2.Response:
    body = {"lora_name": name, "lora_path": path, **more}
    return await server.http.post("/v1/load_lora_adapter", json=body, headers=ADMIN)


async def unload(server: Server, name: str) -> httpx2.Response:
    body = {"lora_name": name}
    return await server.http.post("/v1/unload_lora_adapter", json=body, headers=ADMIN)


def adapted(record: Any) -> dict[str, Any]:
    size = len(record["output_ids"])
    return {
        "model": record["adapter"], "messages": record["messages"], "temperature": 0,
        "max_tokens": size,
    }  # fmt: skip


async def test_tinys_own_adapters_answer_beside_the_base(tiny: Server) -> None:
    """The records were made with PEFT; all of them run in one batch here."""
    answers = await asyncio.gather(
        *(tiny.http.post("/v1/chat/completions", json=adapted(record)) for record in ADAPTED)
    )
    for record, answer in zip(ADAPTED, answers, strict=True):
        said = answer.json()["choices"][0]["message"]["content"]
        assert said == TEXT.decode(record["output_ids"]), record["name"]
    assert {record["adapter"] for record in ADAPTED} == {None, "sql", "json", "pirate"}
    cards = (await tiny.http.get("/v1/models")).json()["data"]
    assert {card["id"]: card["parent"] for card in cards} == {
        "tiny": None, "sql": "tiny", "json": "tiny", "pirate": "tiny",
    }  # fmt: skip


def broken(folder: Path) -> dict[str, int]:
    """Row A1: adapters that cannot be served, and what loading one answers."""
    pirate = resolve("tiny") / "adapters" / "pirate"
    for name in ("nan", "rank", "base", "config", "bytes"):
        shutil.copytree(pirate, folder / name)
    edit(folder / "nan", lambda tensors: {k: t * math.nan for k, t in tensors.items()})
    edit(
        folder / "rank", lambda tensors: {k: t[:2] if "_A" in k else t for k, t in tensors.items()}
    )
    edit(folder / "base", lambda t: {k.replace("layers.0", "layers.99"): v for k, v in t.items()})
    (folder / "config" / "adapter_config.json").write_text("{")
    (folder / "bytes" / "adapter_model.safetensors").write_bytes(b"")
    return {"nan": 400, "rank": 400, "base": 400, "config": 400, "bytes": 400, "missing": 404}


async def test_a1_what_cannot_be_served_disturbs_nobody(tiny: Server) -> None:
    expected = await asyncio.to_thread(broken, tiny.folder)
    traffic = asyncio.gather(
        *(tiny.http.post("/v1/chat/completions", json=adapted(record)) for record in ADAPTED)
    )
    answers = await asyncio.gather(*(load(tiny, name, name) for name in expected))
    assert dict(zip(expected, (a.status_code for a in answers), strict=True)) == expected
    for record, answer in zip(ADAPTED, await traffic, strict=True):
        said = answer.json()["choices"][0]["message"]["content"]
        assert said == TEXT.decode(record["output_ids"])
    for name in expected:
        body = {"prompt": "Once", "max_tokens": 4, "model": name}
        unknown = await tiny.http.post("/v1/completions", json=body)
        assert unknown.json()["error"]["code"] == "model_not_found"
    assert len((await tiny.http.get("/v1/models")).json()["data"]) == 4


async def test_a3_who_runs_keeps_the_old_one(tiny: Server) -> None:
    """A name is given to another adapter while a request uses it, and cannot be unloaded then."""
    record = next(record for record in ADAPTED if record["adapter"] == "sql")
    shutil.copytree(resolve("tiny") / "adapters" / "sql", tiny.folder / "mine")
    assert (await load(tiny, "mine", "mine")).status_code == 200
    body = adapted(record) | {"model": "mine"}
    long = body | {"max_tokens": 150, "ignore_eos": True, "stream": True}
    async with tiny.http.stream("POST", "/v1/chat/completions", json=long) as stream:
        lines = stream.aiter_lines()
        await anext(lines)
        assert (await unload(tiny, "mine")).status_code == 409
        swapped = await load(tiny, "mine", "pirate", load_inplace=True)
        assert swapped.status_code == 200
        new = (await tiny.http.post("/v1/chat/completions", json=body)).json()
        chunks = [json.loads(line[6:]) async for line in lines if line.startswith("data: {")]
    old = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert old.startswith(TEXT.decode(record["output_ids"]))
    assert new["choices"][0]["message"]["content"] != TEXT.decode(record["output_ids"])
    assert (await unload(tiny, "mine")).status_code == 200
    assert (await unload(tiny, "mine")).status_code == 404
    await tiny.until_free()


async def test_embeddings_tell_texts_apart(tiny: Server) -> None:
    texts = [
        "Once upon a time",
        "Once upon a tree",
        "SELECT name FROM customers",
        "Once upon a time",
    ]
    body = {"input": texts, "encoding_format": "base64"}
    coded = (await tiny.http.post("/v1/embeddings", json=body)).json()
    found = [
        struct.unpack("<256f", base64.b64decode(entry["embedding"])) for entry in coded["data"]
    ]
    closeness = [sum(a * b for a, b in zip(found[0], other, strict=True)) for other in found]
    assert closeness[0] == pytest.approx(1)
    assert closeness[3] == pytest.approx(1)
    assert closeness[2] < closeness[1] < 0.999
    ids = {"input": [TEXT.encode(text) for text in texts]}
    plain = (await tiny.http.post("/v1/embeddings", json=ids)).json()
    for entry, vector in zip(plain["data"], found, strict=True):
        assert entry["embedding"] == pytest.approx(vector, abs=1e-5)
    await tiny.until_free()
