"""The openai package against a server: completions, chats, responses, streams, errors."""

import sys

import openai

client = openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="secret", max_retries=0)
say = [{"role": "user", "content": "say hé\u2028llo"}]

assert [model.id for model in client.models.list()] == ["toy", "pirate"]
assert client.models.retrieve("pirate").parent == "toy"
assert client.models.retrieve("toy").id == "toy"

chat = client.chat.completions.create(
    model="toy", messages=say, n=2, seed=3, stop=["zz"], max_completion_tokens=50, logprobs=True,
    top_logprobs=2, temperature=0.5, user="me",
)  # fmt: skip
assert [choice.message.content for choice in chat.choices] == ["hé\u2028llo"] * 2
assert chat.choices[0].finish_reason == "stop"
assert chat.choices[0].logprobs.content[0].token == "h"
assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2
assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens

chat = client.chat.completions.create(model="pirate", messages=say)
assert (chat.model, chat.choices[0].message.content) == ("pirate", "pirate: hé\u2028llo")
turn = client.responses.create(model="pirate", input="say hello")
assert turn.output_text == "pirate: hello"
pieces = client.completions.create(model="pirate", prompt="say abc", stream=True)
assert "".join(chunk.choices[0].text for chunk in pieces) == "pirate: abc"

text, reasons, usage = "", [], None
for chunk in client.chat.completions.create(
    model="toy", messages=say, stream=True, stream_options={"include_usage": True}
):
    usage = chunk.usage or usage
    for choice in chunk.choices:
        text += choice.delta.content or ""
        reasons.append(choice.finish_reason)
assert text == "hé\u2028llo"
assert reasons[-1] == "stop"
assert usage.completion_tokens > 5

completion = client.completions.create(
    model="toy", prompt=["say one", "say two"], echo=True, max_tokens=10
)
assert [choice.text for choice in completion.choices] == ["say oneone", "say twotwo"]
completion = client.completions.create(model="toy", prompt="say ab", logprobs=1)
assert completion.choices[0].logprobs.tokens == ["a", "b", "<|end|>"]
pieces = client.completions.create(model="toy", prompt="say abc", stream=True)
assert "".join(chunk.choices[0].text for chunk in pieces) == "abc"

response = client.responses.create(model="toy", input="say hello", instructions="be kind")
assert response.output_text == "hello"
assert response.status == "completed"
kinds, text = [], ""
for event in client.responses.create(model="toy", input="say hello", stream=True):
    kinds.append(event.type)
    text += event.delta if event.type == "response.output_text.delta" else ""
assert (kinds[0], kinds[-1], text) == ("response.created", "response.completed", "hello")
with client.responses.stream(model="toy", input="say hello") as stream:
    assert stream.get_final_response().output_text == "hello"

vectors = client.embeddings.create(model="toy", input=["one", "three"])
assert [len(entry.embedding) for entry in vectors.data] == [4, 4]
plain = client.embeddings.create(model="toy", input="one", encoding_format="float")
assert plain.data[0].embedding == vectors.data[0].embedding
assert len(client.embeddings.create(model="toy", input=[5, 6], dimensions=2).data[0].embedding) == 2


def fails(kind, **fields):
    try:
        client.chat.completions.create(**{"model": "toy", "messages": say, **fields})
    except kind as error:
        return error
    raise AssertionError(f"{kind} was expected for {fields}")


for stream in (False, True):
    assert fails(openai.BadRequestError, temperature=101, stream=stream).param == "temperature"
    assert fails(openai.NotFoundError, model="nobody", stream=stream).code == "model_not_found"
    long = fails(openai.BadRequestError, max_tokens=5000, stream=stream)
    assert long.code == "context_length_exceeded"
fails(openai.BadRequestError, tools=[{"type": "function", "function": {"name": "f"}}])
broken = [{"role": "user", "content": "break"}]
fails(openai.InternalServerError, messages=broken)
other = client.with_options(api_key="wrong")
try:
    other.models.list()
except openai.AuthenticationError:
    pass
else:
    raise AssertionError("a wrong key was taken")
