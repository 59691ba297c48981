"""/v1/responses: one turn, in OpenAI's newer shapes."""

import json
from typing import Any

import pytest

from tests.server.conftest import Served

PATH = "/v1/responses"


async def test_a_text(server: Served) -> None:
    body = (await server.post(PATH, {"input": "say hello", "instructions": "be kind"})).json()
    assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
    (item,) = body["output"]
    assert (item["type"], item["role"]) == ("message", "assistant")
    assert item["content"] == [
        {"type": "output_text", "text": "hello", "annotations": [], "logprobs": []}
    ]
    usage = body["usage"]
    assert usage["output_tokens"] == 6
    assert usage["total_tokens"] == usage["input_tokens"] + 6
    assert usage["input_tokens_details"] == {"cached_tokens": 4}
    prompt = server.engine.text.decode(server.engine.requests[0].prompt_ids, skip_special=False)
    assert prompt == "<|system|>be kind<|end|><|user|>say hello<|end|><|assistant|>"


async def test_a_conversation_and_a_limit(server: Served) -> None:
    items = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {
            "type": "message", "id": "msg-1", "status": "completed", "role": "assistant",
            "content": [{"type": "output_text", "text": "well", "annotations": []}],
        },
        {"role": "user", "content": "say hello"},
    ]  # fmt: skip
    body = (await server.post(PATH, {"input": items, "max_output_tokens": 2})).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["content"][0]["text"] == "he"


def parse(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


async def test_events(server: Served) -> None:
    answer = await server.post(PATH, {"input": "say hello", "stream": True})
    found = parse(answer.text)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds == [
        "created", "in_progress", "output_item.added", "content_part.added",
        *["output_text.delta"] * 5, "output_text.done", "content_part.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    deltas = [event["delta"] for event in found if event["type"].endswith("text.delta")]
    assert "".join(deltas) == "hello" == found[-4]["text"]
    last = found[-1]["response"]
    assert last["output"] == [found[-2]["item"]]
    assert last["id"] == found[0]["response"]["id"]
    assert found[0]["response"]["output"] == []


async def test_a_failure_after_the_first_event(server: Served) -> None:
    found = parse((await server.post(PATH, {"input": "die", "stream": True})).text)
    assert found[-1]["type"] == "response.failed"
    assert found[-1]["response"]["status"] == "failed"
    assert found[-1]["response"]["error"]["message"] == "The engine has ended."


@pytest.mark.parametrize(
    "fields",
    [
        {"previous_response_id": "resp-1"}, {"store": True}, {"background": True}, {"n": 2},
        {"tools": [{"type": "function"}]}, {"truncation": "auto"}, {"conversation": "c"},
        {"text": {"format": {"type": "json_schema"}}}, {"max_output_tokens": 0}, {"input": []},
        {"input": [{"type": "function_call_output", "role": "user", "content": "x"}]},
    ],
)  # fmt: skip
async def test_what_cannot_be_done_is_refused(server: Served, fields: dict[str, Any]) -> None:
    answer = await server.post(PATH, {"input": "say hi", **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] in {*fields, "messages"}
    assert server.engine.requests == []


async def test_harmless_fields(server: Served) -> None:
    fields = {
        "store": False, "text": {"format": {"type": "text"}}, "truncation": "disabled",
        "tools": [], "tool_choice": "auto", "metadata": {"a": "b"}, "previous_response_id": None,
    }  # fmt: skip
    assert (await server.post(PATH, {"input": "say hi", **fields})).status_code == 200
