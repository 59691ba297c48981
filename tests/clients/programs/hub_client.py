"""huggingface_hub's InferenceClient against a server: generation and chats."""

import sys

from huggingface_hub import InferenceClient

url = sys.argv[1]
client = InferenceClient(model=url, token="secret")

assert client.text_generation("say hi") == "say hihi"
assert client.text_generation("say hi", return_full_text=False) == "hi"
answer = client.text_generation(
    "say hi", details=True, max_new_tokens=10, stop=["zz"], top_n_tokens=2, seed=1
)
assert answer.details.finish_reason == "eos_token"
assert [token.text for token in answer.details.tokens] == ["h", "i", "<|end|>"]
assert answer.details.generated_tokens == 3

# Some of its versions split the stream where JSON may hold these characters as they are.
words = "one\u2028two\u2029three\u0085four"
assert "".join(client.text_generation(f"say {words}", stream=True)) == f"{words}<|end|>"
parts = list(client.text_generation("say hi", stream=True, details=True))
assert [part.token.text for part in parts] == ["h", "i", "<|end|>"]
assert parts[-1].generated_text in ("hi", "say hihi")
assert parts[-1].details.finish_reason == "eos_token"

assert client.text_generation("say hi", adapter_id="pirate") == "say hipirate: hi"
parts = client.text_generation("say hi", adapter_id="pirate", stream=True)
assert "".join(parts) == "pirate: hi<|end|>"

messages = [{"role": "user", "content": f"say {words}"}]
chat = client.chat_completion(messages, max_tokens=50)
assert chat.choices[0].message.content == words
text = ""
for chunk in client.chat_completion(messages, stream=True, max_tokens=50):
    text += chunk.choices[0].delta.content or ""
assert text == words

chat = client.chat_completion(messages, extra_body={"adapter_id": "pirate"})
assert chat.choices[0].message.content == f"pirate: {words}"


def fails(words, call):
    try:
        call()
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    else:
        told = "nothing"
    assert words in told, told


wrong = "`temperature` must be strictly positive"
fails(wrong, lambda: client.text_generation("say hi", temperature=-1.0))
fails(
    "ValidationError", lambda: list(client.text_generation("say hi", temperature=-1.0, stream=True))
)
fails("no model or adapter 'nobody'", lambda: client.text_generation("say hi", adapter_id="nobody"))
fails("GenerationError", lambda: client.text_generation("break"))
