"""Text Generation Inference's routes: shapes, words and statuses that its clients know."""

from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Served, events, served

END = 259  # the fake model's end of text


async def test_the_bare_answer(server: Served) -> None:
    answer = await server.post("/generate", {"inputs": "say hello"})
    assert answer.json() == {"generated_text": "hello"}
    assert answer.headers["x-prompt-tokens"] == "9"
    assert answer.headers["x-generated-tokens"] == "6"
    assert answer.headers["x-compute-characters"] == "9"
    for name in ("total", "validation", "queue", "inference"):
        assert answer.headers[f"x-{name}-time"].isdigit()


async def test_details(server: Served) -> None:
    body = (await server.generate("say hi", details=True, top_n_tokens=2)).json()
    details = body["details"]
    assert details["finish_reason"] == "eos_token"
    assert details["generated_tokens"] == 3
    assert details["prefill"] == []
    assert details["seed"] is None  # greedy
    assert [t["text"] for t in details["tokens"]] == ["h", "i", "<|end|>"]
    assert details["tokens"][2] == {
        "id": END, "text": "<|end|>", "logprob": -0.5, "special": True,
    }  # fmt: skip
    assert [len(top) for top in details["top_tokens"]] == [2, 2, 2]
    assert "best_of_sequences" not in details


async def test_prefill(server: Served) -> None:
    body = (await server.generate("say é", decoder_input_details=True)).json()
    prefill = body["details"]["prefill"]
    assert [t["text"] for t in prefill] == ["s", "a", "y", " ", "", "é"]
    assert [t["logprob"] for t in prefill] == [None, -1, -2, -3, -4, -5]
    assert body["details"]["tokens"][0]["text"] == ""


async def test_the_root_answers_with_a_list_and_the_prompt(server: Served) -> None:
    body = {"inputs": "say hi", "parameters": {"details": False}}
    assert (await server.post("/", body)).json() == [{"generated_text": "say hihi"}]
    body["parameters"] = {"return_full_text": False}
    assert (await server.post("/", body)).json() == [{"generated_text": "hi"}]
    streamed = await server.post("/", {"inputs": "say hi", "stream": True})
    assert events(streamed.text)[-1]["generated_text"] == "say hihi"


async def test_events(server: Served) -> None:
    body = {"inputs": "say hé", "parameters": {"details": True, "top_n_tokens": 1}}
    found = events((await server.post("/generate_stream", body)).text)
    assert [event["index"] for event in found] == [1, 2, 3, 4]
    assert [event["token"]["text"] for event in found] == ["h", "", "é", "<|end|>"]
    assert [event["generated_text"] for event in found] == [None, None, None, "hé"]
    assert found[0]["details"] is None
    assert len(found[0]["top_tokens"]) == 1
    assert found[-1]["token"]["special"] is True
    assert found[-1]["details"] == {
        "finish_reason": "eos_token", "generated_tokens": 4, "seed": None, "input_length": 7,
    }  # fmt: skip


async def test_events_without_details(server: Served) -> None:
    found = events((await server.post("/generate_stream", {"inputs": "say hi"})).text)
    assert found[-1]["details"] is None
    assert "top_tokens" not in found[0]
    assert found[-1]["generated_text"] == "hi"


async def test_a_stop_text_stays_in_the_text(server: Served) -> None:
    parameters = {"stop": ["two"], "details": True}
    body = (await server.generate("say one two three", **parameters)).json()
    assert body["generated_text"] == "one two"
    assert body["details"]["finish_reason"] == "stop_sequence"
    assert body["details"]["generated_tokens"] == 7
    body = {"inputs": "say one two three", "parameters": parameters}
    found = events((await server.post("/generate_stream", body)).text)
    assert "".join(event["token"]["text"] for event in found) == "one two"
    assert found[-1]["generated_text"] == "one two"


async def test_length_goes_before_the_end_of_text(server: Served) -> None:
    body = (await server.generate("say hi", details=True, max_new_tokens=3)).json()
    assert body["details"]["finish_reason"] == "length"


async def test_best_of(server: Served) -> None:
    body = (await server.generate("say hi", best_of=2, do_sample=True, details=True)).json()
    details = body["details"]
    assert details["tokens"][0]["logprob"] == -0.25  # the second choice was likelier
    (other,) = details["best_of_sequences"]
    assert other["generated_text"] == "hi"
    assert other["tokens"][0]["logprob"] == -0.5
    assert other["finish_reason"] == "eos_token"


async def test_when_draws_are_sampled(server: Served) -> None:
    await server.post("/generate", {"inputs": "say x"})
    await server.generate("say x")
    await server.generate("say x", do_sample=None, top_k=3)
    await server.generate("say x", do_sample=True, temperature=0.5, seed=2**64 - 1)
    params = [request.params for request in server.engine.requests]
    assert [p.greedy for p in params] == [False, True, False, False]
    assert [p.temperature for p in params] == [1.0, 0.0, 1.0, 0.5]
    assert params[3].seed == 2**64 - 1
    body = (await server.generate("say x", top_p=0.5, details=True)).json()
    assert body["details"]["seed"] == server.engine.requests[-1].params.seed is not None


async def test_truncate_keeps_the_last_tokens(server: Served) -> None:
    await server.generate("forget this; say hi", truncate=6)
    assert server.engine.text.decode(server.engine.requests[0].prompt_ids) == "say hi"


async def test_every_null_is_the_default(server: Served) -> None:
    names = (
        "best_of", "temperature", "repetition_penalty", "frequency_penalty", "top_k", "top_p",
        "typical_p", "do_sample", "max_new_tokens", "return_full_text", "stop", "truncate",
        "watermark", "details", "decoder_input_details", "seed", "top_n_tokens", "grammar",
        "adapter_id", "lora_id",
    )  # fmt: skip
    answer = await server.generate("say hi", **dict.fromkeys(names))
    assert answer.json() == {"generated_text": "hi"}


MESSAGES = [
    ({"best_of": 0}, "`best_of` must be > 0 and <= 2. Given: 0"),
    ({"best_of": 3, "do_sample": True}, "`best_of` must be > 0 and <= 2. Given: 3"),
    ({"best_of": 2}, "you must use sampling when `best_of` is > 1"),
    (
        {"best_of": 2, "do_sample": True, "seed": 1},
        "`seed` must not be set when `best_of` > 1",
    ),
    ({"temperature": 0.0}, "`temperature` must be strictly positive"),
    ({"repetition_penalty": 0}, "`repetition_penalty` must be strictly positive"),
    ({"frequency_penalty": 2.5}, "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    ({"top_k": 0}, "`top_k` must be strictly positive"),
    ({"top_p": 1.0}, "`top_p` must be > 0.0 and < 1.0"),
    ({"typical_p": 0.0}, "`typical_p` must be > 0.0 and < 1.0"),
    ({"max_new_tokens": 0}, "`max_new_tokens` must be strictly positive"),
    ({"stop": ["a"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
    ({"truncate": 0}, "`truncate` must be strictly positive and less than 511. Given: 0"),
    ({"truncate": 512}, "`truncate` must be strictly positive and less than 511. Given: 512"),
    ({"top_n_tokens": 6}, "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    ({"grammar": {"type": "regex", "value": "a"}}, "grammar is not supported"),
    ({"watermark": True}, "watermark is not supported"),
    (
        {"max_new_tokens": 510},
        "`inputs` tokens + `max_new_tokens` must be <= 512. Given: 6 `inputs` tokens and 510 "
        "`max_new_tokens`",
    ),
]


@pytest.mark.parametrize(("parameters", "words"), MESSAGES)
async def test_validation_in_the_known_words(
    server: Served, parameters: dict[str, Any], words: str
) -> None:
    answer = await server.generate("say hi", **parameters)
    assert answer.status_code == 422
    assert answer.json() == {
        "error": f"Input validation error: {words}",
        "error_type": "validation",
    }
    assert server.engine.requests == []


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ("", "`inputs` cannot be empty"),
        ("x" * 600, "`inputs` must have less than 511 tokens. Given: 600"),
    ],
)
async def test_inputs_in_the_known_words(server: Served, inputs: str, words: str) -> None:
    answer = await server.generate(inputs)
    assert (answer.status_code, answer.json()["error"]) == (422, f"Input validation error: {words}")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"best_of": 2}, "`best_of` != 1 is not supported when streaming tokens"),
        (
            {"decoder_input_details": True},
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
async def test_what_cannot_be_streamed(
    server: Served, parameters: dict[str, Any], words: str
) -> None:
    body = {"inputs": "say hi", "parameters": parameters}
    for path, more in (("/generate_stream", {}), ("/", {"stream": True})):
        answer = await server.post(path, body | more)
        assert answer.status_code == 422
        assert answer.json()["error"] == f"Input validation error: {words}"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"inputs": 1},
        {"inputs": "x", "parameters": {"temperature": False}},
        {"inputs": "x", "parameters": {"max_new_tokens": "5"}},
        {"inputs": "x", "parameters": {"stop": "a"}},
        {"inputs": "x", "parameters": []},
        [],
    ],
)
async def test_wrong_types(server: Served, body: Any) -> None:
    answer = await server.post("/generate", body)
    assert answer.status_code == 400
    assert answer.json()["error_type"] == "validation"


async def test_failures_in_the_model(server: Served) -> None:
    answer = await server.generate("break")
    assert answer.status_code == 424
    assert answer.json() == {
        "error": "Request failed during generation: The model has failed on this request.",
        "error_type": "generation",
    }


async def test_a_failure_after_the_first_event_is_an_event(server: Served) -> None:
    answer = await server.post("/generate_stream", {"inputs": "die"})
    found = events(answer.text)
    assert answer.status_code == 200
    assert found[-1] == {"error": "The engine has ended.", "error_type": "unavailable"}
    assert found[-2]["token"]["text"] == "k"


async def test_invocations_take_every_body(server: Served) -> None:
    path = "/invocations"
    assert (await server.post(path, {"inputs": "say a"})).json() == [{"generated_text": "say aa"}]
    messages = [{"role": "user", "content": "say b"}]
    chat = (await server.post(path, {"messages": messages})).json()
    assert chat["choices"][0]["message"]["content"] == "b"
    completion = (await server.post(path, {"prompt": "say c"})).json()
    assert completion["choices"][0]["text"] == "c"
    wrong = await server.post(path, {"prompt": "say c", "model": "sql"})
    assert (wrong.status_code, wrong.json()["error_type"]) == (404, "not_found")
    assert (await server.post(path, {})).status_code == 400


async def test_limits_are_settings(model: Path) -> None:
    async with served(
        model, max_best_of=3, max_top_n_tokens=1, max_input_tokens=4, max_total_tokens=8
    ) as server:
        assert (await server.generate("a", best_of=3, do_sample=True)).status_code == 200
        wrong = await server.generate("abcde")
        assert "less than 4 tokens. Given: 5" in wrong.json()["error"]
        assert (await server.generate("a", top_n_tokens=2)).status_code == 422
        assert (await server.generate("abcd", max_new_tokens=5)).status_code == 422
