"""Adapters over HTTP: by which names a request gets one, and who may load and unload them."""

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from kvrun.cli.serve import _adapters
from kvrun.errors import InvalidRequest
from kvrun.runtime.engine.request import Delta, Request
from tests.server.conftest import Served, events, served, until
from tests.server.engine import FakeEngine

ADMIN = {"Authorization": "Bearer root"}
LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
TWO = {"sql": "/somewhere/sql", "org/pirate": "org/pirate@v1"}


def make(folder: Path, kind: str = "LORA") -> Path:
    """What looks like an adapter to the fake engine."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


async def load(server: Served, name: str, path: Any, **more: Any) -> Any:
    body = {"lora_name": name, "lora_path": str(path), **more}
    return await server.post(LOAD, body, headers=ADMIN)


async def ids(server: Served) -> list[str]:
    return [card["id"] for card in (await server.http.get("/v1/models")).json()["data"]]


@pytest.mark.parametrize("field", ["model", "adapter_id", "lora_id"])
async def test_openai_routes_find_it_by_every_name(model: Path, field: str) -> None:
    async with served(model, adapters=TWO) as server:
        named = {field: "org/pirate"}
        chat = (await server.chat("say hi", **named)).json()
        assert chat["choices"][0]["message"]["content"] == "org/pirate: hi"
        assert chat["model"] == "org/pirate"
        done = await server.post("/v1/completions", {"prompt": "say hi", "stream": True, **named})
        chunks = events(done.text)[:-1]
        assert "".join(c["choices"][0]["text"] for c in chunks) == "org/pirate: hi"
        assert {chunk["model"] for chunk in chunks} == {"org/pirate"}
        turn = (await server.post("/v1/responses", {"input": "say hi", **named})).json()
        assert turn["output"][0]["content"][0]["text"] == "org/pirate: hi"
        assert turn["model"] == "org/pirate"


@pytest.mark.parametrize("field", ["adapter_id", "lora_id"])
async def test_native_routes_find_it(model: Path, field: str) -> None:
    async with served(model, adapters=TWO) as server:
        found = (await server.generate("say hi", **{field: "sql"})).json()
        assert found["generated_text"] == "sql: hi"
        body = {"inputs": "say hi", "parameters": {field: "sql"}}
        assert events((await server.post("/generate_stream", body)).text)[-1]["generated_text"] == (
            "sql: hi"
        )
        assert (await server.generate("say hi")).json()["generated_text"] == "hi"


async def test_an_unknown_one_is_404_in_each_dialect_and_never_the_base(model: Path) -> None:
    async with served(model, adapters=TWO) as server:
        for stream in (True, False):
            openai = await server.chat("say hi", model="nobody", stream=stream)
            assert openai.status_code == 404
            assert openai.json()["error"]["code"] == "model_not_found"
        for route in ("/generate", "/generate_stream"):
            body = {"inputs": "say hi", "parameters": {"adapter_id": "nobody"}}
            native = await server.post(route, body)
            assert native.status_code == 404
            assert native.json()["error_type"] == "not_found"
        assert server.engine.requests == []


async def test_a_request_has_one_adapter(model: Path) -> None:
    async with served(model, adapters=TWO) as server:
        both = await server.chat("say hi", model="sql", adapter_id="org/pirate")
        assert both.status_code == 400
        same = await server.chat("say hi", model="sql", lora_id="sql")
        assert same.json()["choices"][0]["message"]["content"] == "sql: hi"
        base = await server.chat("say hi", model="toy", lora_id="sql")
        assert base.json()["choices"][0]["message"]["content"] == "sql: hi"


async def test_models_lists_them_under_their_parent(model: Path) -> None:
    async with served(model, adapters=TWO, served_names=("toy", "alias")) as server:
        cards = (await server.http.get("/v1/models")).json()["data"]
        told = [(card["id"], card["parent"], card["root"]) for card in cards]
        assert told == [
            ("toy", None, "toy"), ("alias", None, "toy"), ("sql", "toy", "sql"),
            ("org/pirate", "toy", "org/pirate@v1"),
        ]  # fmt: skip
        assert (await server.http.get("/v1/models/org/pirate")).json() == cards[3]
        assert "/somewhere" not in json.dumps(cards)


@pytest.mark.parametrize("name", ["toy", "kvrun", "a b", "../x", "", "x" * 97])
async def test_names_that_no_adapter_can_have(model: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="cannot be the name"):
        async with served(model, adapters={name: "x"}):
            pass
    assert not FakeEngine.made  # nothing was started for it


# -- at run time ------------------------------------------------------------------------------


async def test_load_and_unload_the_way_vllm_does(model: Path, tmp_path: Path) -> None:
    make(tmp_path / "more" / "sql")
    async with served(model, admin_key="root", lora_folders=(str(tmp_path),)) as server:
        answer = await load(server, "sql", "more/sql")
        assert (answer.status_code, answer.text) == (
            200, "Success: LoRA adapter 'sql' added successfully."
        )  # fmt: skip
        assert await ids(server) == ["toy", "sql"]
        again = await load(server, "sql", "more/sql")
        assert again.status_code == 400
        assert "load_inplace" in again.json()["error"]["message"]
        assert (await load(server, "sql", "more/sql", load_inplace=True)).status_code == 200
        chat = (await server.chat("say hi", model="sql")).json()
        assert chat["choices"][0]["message"]["content"] == "sql: hi"
        gone = await server.post(UNLOAD, {"lora_name": "sql"}, headers=ADMIN)
        assert gone.text == "Success: LoRA adapter 'sql' removed successfully."
        assert await ids(server) == ["toy"]
        assert (await server.chat("say hi", model="sql")).status_code == 404
        twice = await server.post(UNLOAD, {"lora_name": "sql"}, headers=ADMIN)
        assert twice.status_code == 404
        for route, body in ((LOAD, {"lora_name": "x"}), (UNLOAD, {}), (LOAD, {"lora_path": "x"})):
            assert (await server.post(route, body, headers=ADMIN)).status_code == 400


async def test_load_the_way_kv_run_does(model: Path, tmp_path: Path) -> None:
    make(tmp_path / "org" / "sql")
    async with served(model, admin_key="root", lora_folders=(str(tmp_path),)) as server:
        body = {"lora_id": "org/sql", "hf_api_token": None}
        answer = await server.post("/download_lora_adapter", body, headers=ADMIN)
        assert answer.json() == {"lora_id": "org/sql"}
        found = await server.generate("say hi", lora_id="org/sql")
        assert found.json()["generated_text"] == "org/sql: hi"
        nobody = await server.post("/download_lora_adapter", {"lora_id": "x/y"}, headers=ADMIN)
        assert (nobody.status_code, nobody.json()["error_type"]) == (404, "not_found")


async def test_only_the_admin_key_opens_these_routes(model: Path, tmp_path: Path) -> None:
    make(tmp_path / "sql")
    where = {"lora_folders": (str(tmp_path),)}
    body = {"lora_name": "sql", "lora_path": "sql"}
    async with served(model, api_keys=("user",), **where) as server:
        for key in ({}, {"Authorization": "Bearer user"}):
            closed = await server.post(LOAD, body, headers=key)
            assert closed.status_code == 403
            assert "--admin-key" in closed.json()["error"]["message"]
    async with served(model, api_keys=("user",), admin_key="root", **where) as server:
        for key in ({}, {"Authorization": "Bearer user"}, {"Authorization": "Bearer rooT"}):
            assert (await server.post(LOAD, body, headers=key)).status_code == 401
            assert (await server.post(UNLOAD, {}, headers=key)).status_code == 401
        assert server.engine.known == {}
        assert (await server.post(LOAD, body, headers=ADMIN)).status_code == 200
        assert (await server.http.get("/v1/models", headers=ADMIN)).status_code == 200
        assert (await server.http.get("/v1/models")).status_code == 401
    with pytest.raises(InvalidRequest, match="--admin-key"):
        async with served(model, api_keys=("root",), admin_key="root"):
            pass


async def test_only_folders_that_are_allowed(model: Path, tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", make(tmp_path / "outside")
    inside = make(allowed / "inside")
    (allowed / "link").symlink_to(outside)
    (allowed / "near").symlink_to(inside)
    half = make(allowed / "half")
    (half / "adapter_model.safetensors").unlink()
    (half / "adapter_model.safetensors").symlink_to(outside / "adapter_model.safetensors")
    (allowed / "circle").symlink_to(allowed / "circle")
    async with served(model, admin_key="root", lora_folders=(str(allowed),)) as server:
        expected = {
            "../outside": 403, "inside/../../outside": 403, str(outside): 403, "link": 403,
            "half": 403, "/": 403, "\0": 403, str(tmp_path / "nowhere"): 403,
            str(allowed / ".." / "outside"): 403, "..\\outside": 403,
            ".": 404, "": 404, "nobody": 404, "circle": 404, "x" * 5000: 404,
            "~": 404, "dummy:8:1": 404, str(allowed / "nobody"): 404,
            "inside": 200, "near": 200, str(inside): 200,
        }  # fmt: skip
        for path, status in expected.items():
            answer = await load(server, "a", path, load_inplace=True)
            assert answer.status_code == status, (path[:80], answer.text)
            assert ("a" in await ids(server)) is ("a" in server.engine.known)
        assert set(server.engine.known.values()) == {str(inside.resolve())}


async def test_ids_of_the_cache(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = make(tmp_path / "models--org--sql" / "snapshots" / ("c" * 40))
    here = make(tmp_path / "here" / "org" / "sql")  # never taken for one of the cache
    monkeypatch.chdir(here.parents[1])
    async with served(model, admin_key="root") as server:
        assert (await load(server, "sql", "org/sql")).status_code == 200
        assert server.engine.known == {"sql": str(folder)}
        assert (await load(server, "other", "org/other")).status_code == 404


async def test_what_cannot_be_served_changes_nothing(model: Path, tmp_path: Path) -> None:
    make(tmp_path / "good")
    make(tmp_path / "bad", "IA3")
    (tmp_path / "empty").mkdir()
    async with served(model, admin_key="root", lora_folders=(str(tmp_path),)) as server:
        await load(server, "sql", "good")
        for path, status in (("bad", 400), ("empty", 404)):
            answer = await load(server, "sql", path, load_inplace=True)
            assert answer.status_code == status
            assert answer.json()["error"]["param"] == "lora_path"
        assert server.engine.known == {"sql": str(tmp_path / "good")}
        for name in ("toy", "kvrun", "a/b/c", "", "a b", "../a"):
            assert (await load(server, name, "good")).status_code == 400
        assert await ids(server) == ["toy", "sql"]


async def test_unloading_what_is_in_use_is_refused(model: Path) -> None:
    async with served(model, admin_key="root", adapters=TWO) as server:
        answer = asyncio.create_task(server.chat("wait hi", model="sql"))
        await until(lambda: bool(server.engine.running))
        refused = await server.post(UNLOAD, {"lora_name": "sql"}, headers=ADMIN)
        assert refused.status_code == 409
        assert "in use" in refused.json()["error"]["message"]
        while server.engine.running:
            server.engine.step()
            await asyncio.sleep(0)
        text = (await answer).json()["choices"][0]["message"]["content"]
        assert text == "sql: hi"
        gone = await server.post(UNLOAD, {"lora_name": "sql"}, headers=ADMIN)
        assert gone.status_code == 200


async def test_a_load_goes_on_when_its_client_leaves(model: Path, tmp_path: Path) -> None:
    make(tmp_path / "sql")
    async with served(model, admin_key="root", lora_folders=(str(tmp_path),)) as server:
        server.engine.adapter_gate.clear()
        leaves = asyncio.create_task(load(server, "sql", "sql"))
        await until(lambda: bool(server.service.adapters._changing))
        second = await load(server, "sql", "sql")
        assert second.status_code == 409
        leaves.cancel()
        await asyncio.gather(leaves, return_exceptions=True)
        server.engine.adapter_gate.set()
        await until(lambda: "sql" in server.service.adapters)
        assert await ids(server) == ["toy", "sql"]


async def test_one_that_was_unloaded_a_moment_ago(model: Path) -> None:
    async with served(model, admin_key="root", adapters=TWO) as server:
        stream = server.engine.stream

        async def late(request: Request) -> AsyncGenerator[Delta]:
            await server.post(UNLOAD, {"lora_name": "sql"}, headers=ADMIN)
            async for delta in stream(request):
                yield delta

        server.engine.stream = late  # type: ignore[method-assign]
        body = {"prompt": [5, 6], "model": "sql"}
        answer = await server.post("/v1/completions", body)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


async def test_a_damaged_one_is_to_blame_itself(model: Path) -> None:
    async with served(model, adapters={"sql": "/damaged", "good": "/good"}) as server:
        answer = await server.chat("break", model="sql")
        assert answer.status_code == 400
        assert "'sql' cannot be served" in answer.json()["error"]["message"]
        assert (await server.generate("break", adapter_id="sql")).status_code == 422
        assert (await server.generate("break", adapter_id="good")).status_code == 424
        assert (await server.chat("say hi", model="good")).status_code == 200


async def test_what_metrics_say_of_them(model: Path) -> None:
    async with served(model, adapters=TWO) as server:
        streams = [
            asyncio.create_task(server.chat(words, model=name))
            for words, name in (("hang", "sql"), ("queue", "org/pirate"), ("hang", "toy"))
        ]
        await until(lambda: sum(bool(g.first) for g in server.service.live) == 2)
        await until(lambda: len(server.service.live) == 3)
        text = (await server.http.get("/metrics")).text
        found = re.search(r"^vllm:lora_requests_info(.*) (\d+)", text, re.MULTILINE)
        assert found
        assert found[1] == (
            '{max_lora="2",running_lora_adapters="sql",waiting_lora_adapters="org/pirate"}'
        )
        assert int(found[2]) >= server.service.created
        assert 'kvrun_adapter_load_seconds{adapter="sql"} 0.5' in text
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
        assert (
            'kvrun_adapter_requests_total{adapter="sql"} 1'
            in (await server.http.get("/metrics")).text
        )


def test_the_flag_takes_what_tgi_takes() -> None:
    assert _adapters(["org/a@v1,b=/x/b, c=org/c@main", "d=./d"]) == {
        "org/a": "org/a@v1", "b": "/x/b", "c": "org/c@main", "d": "./d",
    }  # fmt: skip
    for wrong in ("a=", "=b", "a=1,a=2"):
        with pytest.raises(InvalidRequest):
            _adapters([wrong])
