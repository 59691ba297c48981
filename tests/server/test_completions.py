"""/v1/completions in OpenAI's shapes."""

from itertools import pairwise
from typing import Any

import pytest

from kvrun.hub.local import resolve
from kvrun.runtime.text import Text
from kvrun.server.openai import Echo
from tests.server.conftest import Served, events

PATH = "/v1/completions"


async def complete(server: Served, /, prompt: Any, **more: Any) -> Any:
    answer = await server.post(PATH, {"prompt": prompt, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_text(server: Served) -> None:
    body = await complete(server, "say hello")
    assert body["object"] == "text_completion"
    choice = body["choices"][0]
    assert choice == {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
    assert body["usage"]["prompt_tokens"] == 9


async def test_lists_of_prompts_and_of_ids(server: Served) -> None:
    ids = server.engine.text.encode("say two")
    body = await complete(server, ["say one", "say three"], n=2)
    assert [c["text"] for c in body["choices"]] == ["one", "one", "three", "three"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == len("say one" + "say three")
    assert (await complete(server, ids))["choices"][0]["text"] == "two"
    body = await complete(server, [ids, ids])
    assert [c["text"] for c in body["choices"]] == ["two", "two"]


async def test_streamed_prompts_side_by_side(server: Served) -> None:
    answer = await server.post(
        PATH,
        {
            "prompt": ["say one", "say three"], "n": 2, "stream": True, "echo": True,
            "stream_options": {"include_usage": True},
        },
    )  # fmt: skip
    *chunks, usage, done = events(answer.text)
    assert done == "[DONE]"
    assert usage["usage"]["completion_tokens"] == 2 * (4 + 6)
    texts = [""] * 4
    reasons: list[list[str]] = [[], [], [], []]
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]].append(choice["finish_reason"])
    assert texts == ["say oneone"] * 2 + ["say threethree"] * 2
    assert all(set(own[:-1]) == {None} and own[-1] == "stop" for own in reasons)


async def test_echo_and_length(server: Served) -> None:
    body = await complete(server, "say hello", echo=True, max_tokens=2)
    assert body["choices"][0]["text"] == "say hellohe"
    assert body["choices"][0]["finish_reason"] == "length"
    ids = server.engine.text.encode("say hello")
    body = await complete(server, ids, echo=True, max_tokens=2)
    assert body["choices"][0]["text"] == "say hellohe"


async def test_logprobs(server: Served) -> None:
    body = await complete(server, "say ab", logprobs=2)
    logprobs = body["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b", "<|end|>"]
    assert logprobs["token_logprobs"] == [-0.5] * 3
    assert logprobs["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
    assert logprobs["text_offset"] == [0, 1, 2]
    answer = await server.post(PATH, {"prompt": "say ab", "logprobs": 0, "stream": True})
    parts = [e["choices"][0]["logprobs"] for e in events(answer.text)[:-1]]
    assert [part["text_offset"] for part in parts] == [[0], [1], [2]]


async def test_echo_with_logprobs_tells_those_of_the_prompt(server: Served) -> None:
    body = {"prompt": "say ab", "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = (await complete(server, **body))["choices"][0]
    assert choice["text"] == "say aba"
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == [*"say ab", "a"]
    assert logprobs["token_logprobs"] == [None, -1, -2, -3, -4, -5, -0.5]
    assert logprobs["top_logprobs"][:2] == [None, {"a": -1.0}]
    assert logprobs["text_offset"] == list(range(7))
    ids = server.engine.text.encode("say ab")
    (again,) = (await complete(server, **body | {"prompt": [ids]}))["choices"]
    assert again == choice
    answer = await server.post(PATH, body | {"stream": True, "n": 2})
    chunks = [event["choices"][0] for event in events(answer.text)[:-1]]
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == "say aba"
        assert own[0]["logprobs"]["token_logprobs"] == [None, -1, -2, -3, -4, -5]
        assert own[1]["logprobs"]["text_offset"] == [6]


@pytest.mark.parametrize("raw", [True, False])
def test_offsets_are_places_in_what_is_repeated(raw: bool) -> None:
    """<|bos|>, which the tokenizer adds, is in the text only where token ids were sent."""
    text = Text(resolve("tiny"))
    prompt = "Once upon — 雪 <|user|> a time"
    ids = text.encode(prompt)
    echo = Echo.of(text, prompt if raw else ids, ids, True)
    assert echo.text == (prompt if raw else "<|bos|>" + prompt)
    parts = [echo.text[a:b] for a, b in pairwise([*echo.places, len(echo.text)])]
    shown = [text.decode([token], skip_special=False) for token in ids]
    assert "".join(parts) == echo.text
    known = [place for place, token in enumerate(shown) if "\ufffd" not in token]
    assert len(known) > 8
    assert [parts[n] for n in known] == ["" if raw and n == 0 else shown[n] for n in known]


async def test_no_tokens_at_all_but_the_prompt(server: Served) -> None:
    body = await complete(server, "say ab", echo=True, logprobs=0, max_tokens=0)
    choice = body["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("say ab", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, -1, -2, -3, -4, -5]
    assert choice["logprobs"]["top_logprobs"] == [None, {}, {}, {}, {}, {}]
    assert body["usage"]["completion_tokens"] == 0


async def test_best_of_returns_the_likeliest(server: Served) -> None:
    body = await complete(server, "say ab", n=2, best_of=3)
    assert server.engine.requests[0].params.n == 3
    assert len(body["choices"]) == 2
    assert body["choices"][0]["logprobs"] is None
    assert body["usage"]["completion_tokens"] == 9


async def test_a_stop_text_ends_one_choice_and_is_no_part_of_it(server: Served) -> None:
    body = await complete(server, "say one two three", stop=["two", "owt"])
    assert body["choices"][0] == {
        "index": 0, "text": "one ", "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    assert body["usage"]["completion_tokens"] == 7
    assert server.engine.running == {}


async def test_a_choice_that_has_stopped_is_computed_no_further(server: Served) -> None:
    await complete(server, "say one two three", stop="two", n=3)
    # The last one to stop takes the request with it.
    name = server.engine.requests[0].id
    assert server.engine.aborts == [(name, 0), (name, 1)]
    assert server.engine.running == {}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [[260]]}, "prompt"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 0, "echo": True, "stream": True}, "max_tokens"),
        ({"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": "a", "max_tokens": -1}, "max_tokens"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "best_of": 9}, "best_of"),
        ({"prompt": "a", "best_of": 2, "stream": True}, "best_of"),
    ],
)
async def test_what_is_refused_names_its_field(
    server: Served, fields: dict[str, Any], param: str
) -> None:
    answer = await server.post(PATH, fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert server.engine.requests == []


async def test_one_prompt_that_fails_ends_the_others(server: Served) -> None:
    answer = await server.post(PATH, {"prompt": ["hang", "break"]})
    assert answer.status_code == 500
    assert server.engine.running == {}
    assert server.service.active == 0
