"""The text-generation package against a server: generation, streams, its errors."""

import asyncio
import sys

from text_generation import AsyncClient, Client
from text_generation.errors import GenerationError, ValidationError

url, headers = sys.argv[1], {"Authorization": "Bearer secret"}
client = Client(url, headers=headers)

answer = client.generate("say hi", max_new_tokens=20)
assert answer.generated_text == "hi"
assert answer.details.finish_reason == "eos_token"
assert [token.text for token in answer.details.tokens] == ["h", "i", "<|end|>"]
best = client.generate("say hi", do_sample=True, best_of=2, top_k=3)
assert best.details.best_of_sequences[0].generated_text == "hi"

parts = list(client.generate_stream("say hé\u2028llo", stop_sequences=["zz"]))
assert "".join(part.token.text for part in parts if not part.token.special) == "hé\u2028llo"
assert parts[-1].generated_text == "hé\u2028llo"
assert parts[-1].details.finish_reason == "eos_token"

chat = client.chat([{"role": "user", "content": "say hello"}], max_tokens=30)
assert chat.choices[0].message.content == "hello"


def fails(kind, call):
    try:
        call()
    except kind:
        return
    raise AssertionError(f"{kind} was expected")


fails(ValidationError, lambda: client.generate("x" * 600))
fails(ValidationError, lambda: list(client.generate_stream("x" * 600)))
fails(GenerationError, lambda: client.generate("break"))


async def twice():
    again = AsyncClient(url, headers=headers)
    one, two = await asyncio.gather(again.generate("say one"), again.generate("say two"))
    assert (one.generated_text, two.generated_text) == ("one", "two")
    texts = [part.token.text async for part in again.generate_stream("say abc")]
    assert texts == ["a", "b", "c", "<|end|>"]


asyncio.run(twice())
