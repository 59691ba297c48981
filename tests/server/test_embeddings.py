"""/v1/embeddings: vectors in both forms, batches, and what is refused."""

import asyncio
import base64
import struct
from pathlib import Path
from typing import Any

import pytest

from kvrun.server.routes import embeddings as route
from tests.server.conftest import Served, served, until


async def embed(server: Served, given: Any, **more: Any) -> Any:
    return await server.post("/v1/embeddings", {"input": given, **more})


def vectors(answer: Any) -> list[list[float]]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert [entry["index"] for entry in body["data"]] == list(range(len(body["data"])))
    assert {entry["object"] for entry in body["data"]} == {"embedding"}
    assert body["object"] == "list"
    return [entry["embedding"] for entry in body["data"]]


async def test_both_forms_hold_the_same(server: Served) -> None:
    plain = await embed(server, "hello", model="toy")
    coded = await embed(server, "hello", encoding_format="base64")
    (vector,), (code,) = vectors(plain), vectors(coded)
    assert list(struct.unpack("<4f", base64.b64decode(code))) == vector
    assert sum(value * value for value in vector) == pytest.approx(1)
    tokens = len(server.service.text.encode("hello"))
    assert plain.json()["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert plain.json()["model"] == "toy"
    assert all(request.pooling for request in server.engine.requests)


async def test_texts_and_ids_one_and_many(server: Served) -> None:
    words = ["a", "two words", "and a third"]
    many = vectors(await embed(server, words))
    assert many == [vectors(await embed(server, word))[0] for word in words]
    assert len({tuple(vector) for vector in many}) == 3
    ids = [server.service.text.encode(word) for word in words]
    assert vectors(await embed(server, ids)) == many
    assert vectors(await embed(server, ids[1])) == [many[1]]


async def test_a_large_batch_goes_a_part_at_a_time(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "AT_ONCE", 3)
    async with served(model, max_concurrent_requests=3) as server:
        words = ["x" * count for count in range(1, 9)]
        assert len({tuple(vector) for vector in vectors(await embed(server, words))}) == 8
        waits = asyncio.create_task(embed(server, ["queue"] * 4))
        await until(lambda: server.service.active == 3)
        await until(lambda: len(server.engine.running) == 3)
        full = await embed(server, "hello")
        assert full.status_code == 429
        waits.cancel()
        await asyncio.gather(waits, return_exceptions=True)
        await until(lambda: not server.engine.running)
        assert server.service.active == 0


async def test_dimensions_keep_the_first_and_the_length(server: Served) -> None:
    (whole,) = vectors(await embed(server, "hello"))
    (cut,) = vectors(await embed(server, "hello", dimensions=2))
    size = (whole[0] ** 2 + whole[1] ** 2) ** 0.5
    assert cut == pytest.approx([whole[0] / size, whole[1] / size])
    assert vectors(await embed(server, "hello", dimensions=4)) == [whole]
    for wrong in (5, 0):
        answer = await embed(server, "hello", dimensions=wrong)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "dimensions"


@pytest.mark.parametrize(
    ("given", "more"),
    [
        ("", {}), ([], {}), ([""], {}), ([[]], {}), ([99999], {}), ([-1], {}), ([1.5], {}),
        (["a"] * 2049, {}), ("a" * 100_000, {}), ("a " * 600, {}), (None, {}), ({"a": 1}, {}),
        ("a", {"encoding_format": "int8"}), ("a", {"tools": [{}]}),
    ],
)  # fmt: skip
async def test_what_is_refused(server: Served, given: Any, more: Any) -> None:
    answer = await embed(server, given, **more)
    assert answer.status_code == 400, answer.text
    assert server.engine.requests == []


async def test_a_failure_is_told(server: Served) -> None:
    answer = await embed(server, ["fine", "break"])
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert server.engine.running == {}


async def test_adapters_and_unknown_models(model: Path) -> None:
    async with served(model, adapters={"sql": "/sql"}) as server:
        answer = await embed(server, "hello", model="sql")
        assert answer.json()["model"] == "sql"
        assert server.engine.requests[0].adapter == "sql"
        unknown = await embed(server, "hello", model="nobody")
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"


async def test_what_is_counted(server: Served) -> None:
    await embed(server, ["a", "b"])
    text = (await server.http.get("/metrics")).text.splitlines()
    assert "tgi_request_count 1" in text
    assert "tgi_request_success 1" in text
    assert "tgi_request_input_length_count 2.0" in text
    assert "tgi_request_generated_tokens_count 0.0" in text
    assert "vllm:time_to_first_token_seconds_count 0.0" in text
