"""/v1/chat/completions in OpenAI's shapes."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Served, events, served, until


async def test_an_answer(server: Served) -> None:
    answer = await server.chat("say hello")
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "toy"
    choice = body["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "hello", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    usage = body["usage"]
    assert usage["completion_tokens"] == 6  # the end of the text is a token too
    assert usage["prompt_tokens"] == len(server.engine.requests[0].prompt_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + 6
    assert usage["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_streamed_chunks_join_to_the_same_answer(server: Served) -> None:
    whole = (await server.chat("say hé\u2028llo")).json()
    answer = await server.chat(
        "say hé\u2028llo", stream=True, stream_options={"include_usage": True}
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.text.isascii()  # clients split lines at U+2028
    *chunks, usage, done = events(answer.text)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    joined = "".join(delta.get("content", "") for delta in deltas)
    assert joined == whole["choices"][0]["message"]["content"] == "hé\u2028llo"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


async def test_usage_in_every_chunk(server: Served) -> None:
    answer = await server.chat(
        "say abc", stream=True, stream_options={"continuous_usage_stats": True}
    )
    counts = [e["usage"]["completion_tokens"] for e in events(answer.text)[1:-1]]
    assert counts == [1, 2, 3, 4]


async def test_several_answers(server: Served) -> None:
    body = (await server.chat("say ab", n=3)).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 9
    streamed = events((await server.chat("say ab", n=2, stream=True)).text)
    for index in (0, 1):
        own = [e["choices"][0] for e in streamed[:-1] if e["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "ab"
        assert own[-1]["finish_reason"] == "stop"


async def test_logprobs(server: Served) -> None:
    body = (await server.chat("say ab", logprobs=True, top_logprobs=2)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["a", "b", "<|end|>"]
    assert content[0]["logprob"] == -0.5
    assert content[0]["bytes"] == [97]
    assert [entry["token"] for entry in content[0]["top_logprobs"]] == ["a", "b"]
    assert server.engine.requests[0].params.logprobs == 2
    streamed = events((await server.chat("say ab", logprobs=True, stream=True)).text)
    entries = [e["choices"][0]["logprobs"] for e in streamed[1:-1]]
    assert [entry["content"][0]["token"] for entry in entries] == ["a", "b", "<|end|>"]
    assert (await server.chat("hi", top_logprobs=2)).status_code == 400


async def test_options_reach_the_engine(server: Served) -> None:
    await server.chat(
        "say x", temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=2**64 - 1, stop="zz",
        presence_penalty=1, frequency_penalty=-1, logit_bias={"5": 2}, max_completion_tokens=9,
        max_tokens=3, min_tokens=1, ignore_eos=True, stop_token_ids=[7], user="me", n=None,
    )  # fmt: skip
    params = server.engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 7)
    assert (params.min_p, params.seed, params.stop) == (0.1, 2**64 - 1, ("zz",))
    assert (params.presence_penalty, params.frequency_penalty) == (1, -1)
    assert params.logit_bias == {5: 2.0}
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (9, 1, True)
    assert params.stop_token_ids == (7,)


async def test_the_models_own_defaults_count(scripted: Any, tmp_path: Path) -> None:
    folder = scripted.make_model(tmp_path / "m", generation={"temperature": 0.3, "top_k": 9})
    async with served(folder) as server:
        await server.chat("say x")
        await server.chat("say x", temperature=1)
        first, second = (request.params for request in server.engine.requests)
        assert (first.temperature, first.top_k) == (0.3, 9)
        assert (second.temperature, second.top_k) == (1.0, 9)


async def test_roles_parts_and_a_last_message_to_continue(server: Served) -> None:
    messages = [
        {"role": "developer", "content": "be brief", "name": None},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "2"}],
        },
        {"role": "assistant", "content": "Well"},
    ]
    await server.post("/v1/chat/completions", {"messages": messages})
    prompt = server.engine.text.decode(server.engine.requests[0].prompt_ids, skip_special=False)
    assert prompt == "<|system|>be brief<|end|><|user|>one\n2<|end|><|assistant|>Well"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"temperature": 101}, "temperature"),
        ({"temperature": False}, "temperature"),
        ({"n": 9}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9999": 1}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages"),
    ],
)
async def test_what_is_refused_names_its_field(
    server: Served, fields: dict[str, Any], param: str
) -> None:
    answer = await server.chat("say hi", **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert server.engine.requests == []


async def test_both_grammar_and_tools_are_refused_as_clients_know_it(server: Served) -> None:
    answer = await server.chat("x", tools=[{}], response_format={"type": "json_object"})
    assert answer.status_code == 422
    assert answer.json() == {
        "error": "Tool error: Grammar and tools are mutually exclusive",
        "error_type": "tool_error",
    }


async def test_what_means_nothing_is_no_reason_to_refuse(server: Served) -> None:
    answer = await server.chat(
        "say hi", tools=[], tool_choice="auto", response_format={"type": "text"}, store=True,
        frobnicate={"a": 1},
    )  # fmt: skip
    assert answer.status_code == 200


async def test_an_image_is_refused_in_words(server: Served) -> None:
    parts = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    answer = await server.post("/v1/chat/completions", body)
    assert answer.status_code == 400
    assert "reads only text" in answer.json()["error"]["message"]


async def test_too_long_is_known_before_the_first_byte(server: Served) -> None:
    for fields in ({"max_tokens": 512}, {"max_tokens": 512, "stream": True}):
        answer = await server.chat("say hi", **fields)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
    answer = await server.chat("x" * 513, stream=True)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


async def test_a_request_that_fails_in_the_model(server: Served) -> None:
    answer = await server.chat("break")
    assert answer.status_code == 500
    assert "NaN" not in answer.text
    assert (await server.chat("break", stream=True)).status_code == 500
    assert (await server.chat("say hi")).status_code == 200


async def test_the_queue_has_an_end(model: Path) -> None:
    async with served(model, max_concurrent_requests=2) as server:
        first = asyncio.create_task(server.chat("hang", n=2))
        await until(lambda: server.service.active == 2)
        for stream in (False, True):
            refused = await server.chat("say hi", stream=stream)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["message"] == "Model is overloaded"
        assert (await server.generate("hi")).json() == {
            "error": "Model is overloaded",
            "error_type": "overloaded",
        }
        first.cancel()
        await until(lambda: server.service.active == 0)
        assert (await server.chat("say hi")).status_code == 200


async def test_who_waits_too_long_is_told(model: Path) -> None:
    async with served(model, queue_timeout=0.01) as server:
        answer = await server.chat("queue", stream=True)
        assert answer.status_code == 503
        assert server.service.active == 0


async def test_an_answer_that_takes_too_long_is_cut(model: Path) -> None:
    async with served(model, request_timeout=0.01) as server:
        assert (await server.chat("hang")).status_code == 503
        streamed = events((await server.chat("hang", stream=True)).text)
        assert streamed[-2]["choices"][0]["finish_reason"] == "abort"
        assert streamed[-1] == "[DONE]"
        native = await server.generate("hang")
        assert (native.status_code, native.json()["error_type"]) == (500, "incomplete_generation")
