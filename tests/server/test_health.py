"""Probes, what the server says of itself, and the phases of its life."""

from pathlib import Path

import msgspec
import pytest

from kvrun.errors import EngineDead
from tests.server.conftest import Served, served
from tests.server.engine import FakeEngine

PROBES = ("/", "/health", "/ping", "/readyz")


async def test_alive_before_it_is_ready(model: Path) -> None:
    async with served(model, start=False) as server:
        assert (await server.http.get("/healthz")).status_code == 200
        for path in PROBES:
            answer = await server.http.get(path)
            assert answer.status_code == 503
            assert answer.json() == {"error": "unhealthy", "error_type": "healthcheck"}
            assert answer.headers["retry-after"]
        for path in ("/info", "/v1/models"):
            assert (await server.http.get(path)).status_code == 503
        assert (await server.chat("hi")).status_code == 503
        await server.service.start()
        for path in PROBES:
            answer = await server.http.get(path)
            assert (answer.status_code, answer.content) == (200, b"")


async def test_draining_takes_nothing_new(server: Served) -> None:
    await server.service.drain(0.1)
    assert (await server.http.get("/readyz")).status_code == 503
    assert (await server.http.get("/healthz")).status_code == 200
    refused = await server.chat("hi")
    assert refused.status_code == 503
    assert refused.json()["error"]["message"] == "The server is shutting down."
    assert (await server.generate("hi")).json()["error_type"] == "unavailable"


async def test_info_has_the_fields_of_both_versions(server: Served) -> None:
    info = (await server.http.get("/info")).json()
    assert info["model_id"] == "toy"
    assert info["max_total_tokens"] == 512
    assert info["max_input_tokens"] == info["max_input_length"] == 511
    assert info["max_batch_total_tokens"] == 4096
    assert info["model_device_type"] == "cpu"
    assert (await server.http.get("/version")).json() == {"version": info["version"]}


async def test_models_are_listed_with_every_name(model: Path) -> None:
    async with served(model, served_names=("org/friendly", "other")) as server:
        cards = (await server.http.get("/v1/models")).json()["data"]
        assert [card["id"] for card in cards] == ["org/friendly", "other"]
        assert cards[0]["parent"] is None
        assert cards[0]["max_model_len"] == 512
        assert (await server.http.get("/v1/models/org/friendly")).json() == cards[0]
        missing = await server.http.get("/v1/models/nobody")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("name", ["tgi", "dummy", "kvrun", "", None, "toy", "http://x/v1"])
async def test_names_that_mean_the_model(server: Served, name: str | None) -> None:
    assert (await server.chat("say hi", model=name)).status_code == 200


@pytest.mark.parametrize("field", ["model", "adapter_id", "lora_id"])
async def test_an_unknown_adapter_is_never_the_base(server: Served, field: str) -> None:
    answer = await server.chat("say hi", **{field: "sql"})
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"
    assert "sql" in answer.json()["error"]["message"]
    assert server.engine.requests == []


async def test_an_unknown_adapter_in_native_words(server: Served) -> None:
    answer = await server.generate("say hi", adapter_id="sql")
    assert answer.status_code == 404
    assert answer.json()["error_type"] == "not_found"
    assert (await server.generate("say hi", lora_id="empty")).status_code == 200


async def test_request_ids_come_back(server: Served) -> None:
    kept = await server.http.get("/health", headers={"x-request-id": "mine_1-A"})
    assert kept.headers["x-request-id"] == "mine_1-A"
    made = await server.http.get("/health", headers={"x-request-id": "a b\x00"[:3]})
    assert len(made.headers["x-request-id"]) == 32


async def test_an_engine_that_is_started_again_is_not_ready_meanwhile(server: Served) -> None:
    async def restarts() -> str:
        lines = (await server.http.get("/metrics")).text.splitlines()
        return next(line for line in lines if line.startswith("kvrun_engine_restarts_total"))

    assert await restarts() == "kvrun_engine_restarts_total 0"
    server.engine.on_restart(EngineDead("the engine process has ended.", cause="signal 11"))
    assert (await server.http.get("/health")).status_code == 503
    assert (await server.http.get("/healthz")).status_code == 200
    assert (await server.chat("say hi")).status_code == 200, "who comes now waits for it"
    again = await FakeEngine(server.service.config).start()
    server.engine.on_restart(msgspec.structs.replace(again, kv_tokens=2048))
    assert (await server.http.get("/health")).status_code == 200
    assert (await server.http.get("/info")).json()["max_batch_total_tokens"] == 2048
    assert await restarts() == "kvrun_engine_restarts_total 1"
