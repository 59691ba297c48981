"""kvrun serve on the real engine and the built-in model: the pieces fit together."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from kvrun.hub.local import resolve
from kvrun.runtime.text import Text
from tests.server.conftest import events

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tiny"
TEXT = Text(resolve("tiny"))
PATIENCE = 60.0


class Server:
    def __init__(self, port: int, process: asyncio.subprocess.Process) -> None:
        self.port = port
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
async def tiny() -> AsyncIterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-X", "importtime", "-m", "kvrun", "serve", "-p", str(port),
        "--threads", "1", "--kv-memory", "64M",
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=asyncio.subprocess.PIPE, limit=1 << 22,
    )  # fmt: skip
    server = Server(port, process)
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
    answer: Any = await tiny.http.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": info["max_total_tokens"]}
    )
    assert answer.json()["error"]["code"] == "context_length_exceeded"
