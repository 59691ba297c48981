"""An engine that follows a script: EngineClient's face without a model or a process.

Run as a program it is `kvrun` on that engine, for tests that need a terminal of their own.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import ClassVar

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kvrun.errors import EngineDead, InvalidRequest, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.request import AdapterInfo, Delta, Logprob, Ready, Request, Stats
from kvrun.runtime.text import Text

SPECIAL = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_model(folder: Path, *, template: bool = True, generation: dict | None = None) -> Path:
    """A model folder with a tokenizer of one token per byte, and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (folder / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    if template:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


class ScriptedEngine:
    """Answers by the last question.

    "say X": X · "burst X": X in one delta · "flood": x without end · "hang": begins and never
    ends · "die": the engine dies in the middle · "break": the request fails · anything else:
    repeats the question.
    """

    started: ClassVar[list["ScriptedEngine"]] = []

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.text = Text(config.model)
        self.requests: list[Request] = []
        self.ended_early: list[str] = []
        self.closed = False
        self.loaded = dict(config.adapters)
        self.dead = False
        self.started.append(self)

    async def start(self) -> Ready:
        if self.config.dtype == "float16":
            raise Unsupported("float16 is not for this machine.", hint="--dtype float32")
        length = self.config.max_model_len or 4096
        return Ready(
            plan="weights 1 MB, KV 2 MB = 4,096 tokens",
            max_model_len=length,
            vocab_size=260,
            kv_tokens=4096,
            block_size=16,
            device="cpu",
            dtype="float32",
            attention="sdpa",
            load_seconds=0.0,
        )

    def question(self, request: Request) -> str:
        """The last question of a request's prompt, or all of a prompt without a template."""
        prompt = self.text.decode(request.prompt_ids, skip_special=False)
        return prompt.rpartition("<|user|>")[2].partition("<|end|>")[0]

    async def stream(self, request: Request) -> AsyncIterator[Delta]:
        if self.dead:
            raise EngineDead("the engine process has ended.")
        self.requests.append(request)
        finished = False
        try:
            async for delta in self._answer(request):
                finished = delta.finish_reason is not None
                yield delta
        finally:
            if not finished:
                self.ended_early.append(request.id)

    async def _answer(self, request: Request) -> AsyncIterator[Delta]:
        question = self.question(request)
        verb, _, rest = question.partition(" ")
        if verb == "break":
            yield Delta(request_id=request.id, finish_reason="error", error="NaN in the logits")
            return
        while verb == "flood":
            await asyncio.sleep(0)
            yield Delta(request_id=request.id, token_ids=self.text.encode("x"))
        if verb == "burst":
            yield Delta(
                request_id=request.id, token_ids=self.text.encode(rest), finish_reason="length"
            )
            return
        answer = rest if verb == "say" else f"You said: {question}"
        ids = self.text.encode("Let me think " if verb in ("hang", "die") else answer)
        most = request.params.max_tokens or 1 << 30
        for count, token in enumerate(ids[:most], 1):
            await asyncio.sleep(0)
            for index in range(request.params.n):
                yield self._delta(request, index, token, count, count == most)
        if verb == "hang":
            await asyncio.Event().wait()
        if verb == "die":
            self.dead = True
            raise EngineDead("the engine process has ended.", cause="it was killed by signal 9")
        if len(ids) < most:
            end = self.text.eos_token_ids[0]
            for index in range(request.params.n):
                yield Delta(
                    request_id=request.id, index=index, token_ids=[end], finish_reason="stop"
                )

    def _delta(self, request: Request, index: int, token: int, count: int, last: bool) -> Delta:
        scores = [Logprob(token, -0.5, [(token, -0.5)])] if request.params.logprobs else None
        return Delta(
            request_id=request.id,
            index=index,
            token_ids=[token],
            logprobs=scores,
            cached_tokens=4 if count == 1 else 0,
            finish_reason="length" if last else None,
        )

    async def abort(self, request_id: str) -> None:
        raise InvalidRequest("leaving the stream is the way to end a request")

    async def stats(self) -> Stats:
        return Stats(steps=len(self.requests), generated_tokens=1234)

    async def adapters(self) -> list[AdapterInfo]:
        return [self._info(name, path) for name, path in self.loaded.items()]

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        self.loaded[name] = path
        return self._info(name, path)

    async def unload_adapter(self, name: str) -> None:
        if name not in self.loaded:
            raise InvalidRequest(f"there is no adapter '{name}'.")
        del self.loaded[name]

    @staticmethod
    def _info(name: str, path: str) -> AdapterInfo:
        return AdapterInfo(name=name, path=path, bytes=350_208, ranks=[4], state="disk")

    async def close(self) -> None:
        self.closed = True


if __name__ == "__main__":
    import kvrun.runtime.engine.client as client
    from kvrun.cli import main

    client.EngineClient = ScriptedEngine  # type: ignore[misc,assignment]
    main(sys.argv[1:])
