"""Text to tokens and back over HTTP."""

from tests.server.conftest import Served


async def test_tokens_with_their_places_in_bytes(server: Served) -> None:
    tokens = (await server.post("/tokenize", {"inputs": "aé<|end|>"})).json()
    assert [(t["text"], t["start"], t["stop"]) for t in tokens] == [
        ("a", 0, 1), ("é", 1, 3), ("é", 1, 3), ("<|end|>", 3, 10),
    ]  # fmt: skip
    assert [t["id"] for t in tokens] == server.engine.text.encode("aé<|end|>")


async def test_ids_and_back(server: Served) -> None:
    answer = (await server.post("/tokenize", {"prompt": "héllo"})).json()
    assert answer == {
        "tokens": server.engine.text.encode("héllo"), "count": 6, "max_model_len": 512,
    }  # fmt: skip
    back = await server.post("/detokenize", {"tokens": answer["tokens"]})
    assert back.json() == {"prompt": "héllo"}


async def test_a_conversation_as_the_template_puts_it(server: Served) -> None:
    messages = [{"role": "user", "content": "é <|end|>"}]
    answer = (await server.post("/chat_tokenize", {"messages": messages})).json()
    text, tokens = answer["templated_text"], answer["tokenize_response"]
    assert text == "<|user|>é <|end|><|end|><|assistant|>"
    data = text.encode()
    assert b"".join(data[t["start"] : t["stop"]] for t in tokens) == data
    assert "".join(t["text"] for t in tokens) == text
    ends = [t["id"] for t in tokens if t["text"] == "<|end|>"]
    assert len(ends) == 1  # what the user wrote is no control token


async def test_the_special_tokens_by_their_roles(server: Served) -> None:
    assert (await server.http.get("/tokenizer_info")).json() == {"eos_token": "<|end|>"}


async def test_refusals(server: Served) -> None:
    for path, body, status in (
        ("/tokenize", {}, 422),
        ("/tokenize", {"inputs": "x" * 9000}, 422),
        ("/detokenize", {"tokens": [-1]}, 422),
        ("/detokenize", {"tokens": [260]}, 422),
        ("/detokenize", {"tokens": [1] * 513}, 422),
        ("/detokenize", {"tokens": ["a"]}, 400),
        ("/chat_tokenize", {"messages": []}, 400),
    ):
        answer = await server.post(path, body)
        assert answer.status_code == status, (path, answer.text)
        assert answer.json()["error_type"] == "validation"
