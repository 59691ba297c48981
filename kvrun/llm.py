"""LLM: a model by name, the engine in this process, text at its edge."""

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from kvrun.errors import InvalidRequest, KvrunError
from kvrun.hub.local import adapters_of, resolve, resolve_adapter
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.engine.engine import Engine, describe
from kvrun.runtime.engine.request import (
    AdapterChoice,
    AdapterInfo,
    Delta,
    Logprob,
    Ready,
    Request,
    Stats,
)
from kvrun.runtime.engine.start import start
from kvrun.runtime.image import Image
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.runtime.text import Answer, Prompt, Text
from kvrun.runtime.text.images import Picture, Pictures, of_each

Words = str | Sequence[int]
Message = Mapping[str, object]
Adapters = AdapterChoice | Sequence[str | None]


@dataclass
class Choice:
    """One answer. `finish_reason`: "stop", "length", or "error" (then `error` says why)."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprob] | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass
class Output(Choice):
    """The answer to one prompt; with n > 1 the output itself is choice 0."""

    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[Logprob] | None = None  # of the prompt's tokens from the second on
    choices: list[Choice] = field(default_factory=list)


@dataclass(frozen=True)
class TextDelta:
    """A piece of an answer as it streams; `index` is the choice it belongs to."""

    text: str
    token_ids: list[int]
    logprobs: list[Logprob] | None
    finish_reason: str | None
    index: int


class LLM:
    """A model ready to answer, in this process.

    `model` is a local folder, the name of a model in the cache, or the built-in "tiny". `kv_memory`
    is bytes or a fraction of what is free; `quantize` rounds a model in 16 or 32 bits as it is read
    ("int8", "int4", "nf4", "fp4", "fp8"); sizes left at None fit themselves to the machine. A
    folder without a tokenizer works: prompts must then be token ids, and texts are empty.
    `adapters` are LoRA adapters, name -> PEFT folder; those of a built-in model are known anyhow.
    On CPU a step runs on `threads` threads, or else on as many as it gains by, at most torch's.
    An architecture without a family here runs by transformers' own code, which a line on stderr
    says and `fallback=False` refuses.

    Raises NotFound, BadCheckpoint or Unsupported (kvrun.errors), each saying what to do.
    """

    def __init__(
        self,
        model: str = "tiny",
        *,
        adapters: Mapping[str, str] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        attention: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int | None = None,
        kv_memory: int | float | None = None,
        kv_dtype: str = "auto",
        lora_memory: int | float | None = None,
        prefix_caching: bool = True,
        cuda_graphs: bool = True,
        fallback: bool = True,
        seed: int = 0,
        load_format: str = "auto",
        threads: int | None = None,
    ) -> None:
        folder = resolve(model)
        given = {n: str(resolve_adapter(model, path)) for n, path in (adapters or {}).items()}
        config = EngineConfig(
            model=str(folder),
            adapters=adapters_of(model) | given,
            device=device,
            dtype=dtype,
            quantize=quantize,
            attention=attention,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            kv_memory=kv_memory,
            kv_dtype=kv_dtype,
            lora_memory=lora_memory,
            prefix_caching=prefix_caching,
            cuda_graphs=cuda_graphs,
            fallback=fallback,
            seed=seed,
            load_format=load_format,
            threads=threads,
        )
        self._alive: Engine | None = start(config)
        if note := self._alive.ready.note:
            print(note, file=sys.stderr)
        self._model = model
        self._text = Text.open(folder)
        self._numbers = itertools.count()
        self._runs: dict[str, _Run] = {}
        self.plan = self._engine.ready.plan
        self.max_model_len = self._engine.ready.max_model_len

    def generate(
        self,
        prompts: Words | Sequence[Words],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: Adapters = None,
        images: Pictures | Sequence[Pictures] = None,
    ) -> list[Output]:
        """Answer every prompt (text, token ids, or a list of either), batched.

        `params` is one for all prompts or one for each. `adapter` is a name, [(name, weight), ...]
        or None (the base model) for all prompts, or a list of names and Nones, one for each
        prompt. `images` are one or several for a single prompt, or a list of None, one or several
        for each; the model's own word, as <image>, stands for one in a text. Raises InvalidRequest
        before anything is computed if one of them cannot be served; an answer that fails later says
        so itself.
        """
        listed = _listed(prompts)
        count = len(listed)
        each = _one_each(params, count), _adapter_each(adapter, count)
        single = isinstance(prompts, str) or (count == 1 and listed[0] is prompts)
        shown = of_each(images, None if single else count)
        return self._answer([self._encode(p, s) for p, s in zip(listed, shown, strict=True)], *each)

    def _answer(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        adapters: Sequence[AdapterChoice],
    ) -> list[Output]:
        runs = self._submit(prompts, params, adapters)
        try:
            while not all(run.done for run in runs):
                self._step()
        finally:
            self._end(runs)
        return [run.output() for run in runs]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        adapter: Adapters = None,
    ) -> list[Output]:
        """Answer a conversation, or several, each a list of {"role", "content"}.

        Content is text, or a list of parts {"type": "text", "text": ...} and {"type": "image",
        "image": a path, a file's bytes or a picture of Pillow's}, also in OpenAI's form.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations = messages if several else [messages]
        if self._text is None:
            raise InvalidRequest("this model has no tokenizer.", hint="pass prompts as token ids")
        prompts = [self._text.converse(c, local=True) for c in conversations]  # type: ignore[arg-type]
        count = len(prompts)
        return self._answer(prompts, _one_each(params, count), _adapter_each(adapter, count))

    def stream(
        self,
        prompt: Words,
        params: SamplingParams | None = None,
        adapter: AdapterChoice = None,
        images: Pictures = None,
    ) -> Iterator[TextDelta]:
        """One prompt's answer piece by piece; closing the iterator ends the request."""
        words = self._encode(prompt, of_each(images, None)[0])
        run = self._submit([words], [params or SamplingParams()], [adapter])[0]
        try:
            while not run.done or run.deltas:
                yield from run.take()
                if not run.done:
                    self._step()
        finally:
            self._end([run])

    def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Serve the PEFT folder `path` as `name`; a name that is taken goes to the new adapter.

        Raises NotFound, BadCheckpoint, Unsupported or InvalidRequest; nothing has changed then.
        """
        loading = self._engine.load_adapter(name, str(resolve_adapter(self._model, path)))
        while not loading.done():
            self._step()
        return loading.result()

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InvalidRequest if it is unknown or a request is using it."""
        self._engine.unload_adapter(name)

    def adapters(self) -> list[AdapterInfo]:
        """The adapters that are known, in the order in which they came."""
        return self._engine.adapters()

    def stats(self) -> Stats:
        """The engine's counters."""
        return self._engine.stats()

    @property
    def ready(self) -> Ready:
        """What the engine said of itself when it had started: device, dtype, sizes."""
        return self._engine.ready

    def close(self) -> None:
        """Give the memory back. The object cannot be used afterwards."""
        self._alive = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _engine(self) -> Engine:
        if self._alive is None:
            raise KvrunError("this LLM is closed.", hint="make a new one")
        return self._alive

    def _encode(self, prompt: Words, images: Sequence[Picture]) -> Prompt:
        if self._text is not None:
            return self._text.encode_with(prompt, images)
        if isinstance(prompt, str) or not all(isinstance(image, Image) for image in images):
            raise InvalidRequest("this model has no tokenizer.", hint="pass prompts as token ids")
        return Prompt(list(prompt), list(images))  # type: ignore[arg-type]

    def _submit(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        adapters: Sequence[AdapterChoice],
    ) -> "list[_Run]":
        requests = [
            Request(
                id=f"llm-{next(self._numbers)}",
                prompt_ids=w.ids,
                params=p,
                adapter=a,
                images=w.images,
            )
            for w, p, a in zip(prompts, params, adapters, strict=True)
        ]
        runs = [_Run(request, self._text) for request in requests]
        try:
            for run in runs:
                self._engine.add(run.request)
                self._runs[run.request.id] = run
        except BaseException:
            self._end(runs)
            raise
        return runs

    def _end(self, runs: "Sequence[_Run]") -> None:
        """Nothing is left of these runs in the engine, however the call that made them ended."""
        left = [run for run in runs if run.request.id in self._runs]
        if left and self._alive is not None:
            for run in left:
                self._alive.abort(run.request.id)
            self._step()

    def _step(self) -> None:
        """One engine step; its deltas go to their runs, whoever is waiting for them."""
        for delta in self._engine.step():
            run = self._runs[delta.request_id]
            if run.feed(delta):
                self._engine.abort(run.request.id, delta.index)
            if run.ended:
                del self._runs[delta.request_id]


class _Run:
    """A request of this LLM and what has come of it."""

    def __init__(self, request: Request, text: Text | None) -> None:
        self.request = request
        self.deltas: list[TextDelta] = []
        choices, params = range(request.params.n), request.params
        self._choices = [Choice(logprobs=_empty(params.logprobs)) for _ in choices]
        self._answers = [text.answer(params.stop) if text else Answer(None) for _ in choices]
        self._prompt_logprobs: list[Logprob] | None = None
        self._open = params.n  # choices the engine has not ended

    @property
    def done(self) -> bool:
        """Every choice has its finish reason, although the engine may not know of it yet."""
        return all(choice.finish_reason for choice in self._choices)

    @property
    def ended(self) -> bool:
        return self._open == 0

    def feed(self, delta: Delta) -> bool:
        """Take in a delta; True when the choice has ended here before it has in the engine."""
        self._open -= delta.finish_reason is not None
        choice, answer = self._choices[delta.index], self._answers[delta.index]
        self._prompt_logprobs = self._prompt_logprobs or delta.prompt_logprobs
        if choice.finish_reason:
            return False
        reason = delta.finish_reason
        choice.error = delta.error
        try:
            text, count = answer.take(delta.token_ids, reason)
            choice.finish_reason = answer.finish_reason
        except Exception as error:  # a text that cannot be made is this request's fault only
            text, count = "", len(delta.token_ids)
            choice.finish_reason, choice.error = "error", describe(error)
        ids, logprobs = delta.token_ids[:count], delta.logprobs and delta.logprobs[:count]
        choice.text += text
        choice.token_ids += ids
        if choice.logprobs is not None:
            choice.logprobs += logprobs or []
        self.deltas.append(TextDelta(text, ids, logprobs, choice.finish_reason, delta.index))
        return reason is None and choice.finish_reason is not None

    def take(self) -> list[TextDelta]:
        deltas, self.deltas = self.deltas, []
        return deltas

    def output(self) -> Output:
        first = self._choices[0]
        return Output(
            **vars(first),
            prompt_token_ids=list(self.request.prompt_ids),
            prompt_logprobs=self._prompt_logprobs,
            choices=[first, *self._choices[1:]],
        )


def _empty(logprobs: int | None) -> list[Logprob] | None:
    return None if logprobs is None else []


def _listed(prompts: Words | Sequence[Words]) -> list[Words]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]  # one prompt of token ids
    return list(prompts)  # type: ignore[arg-type]


def _one_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest(f"{count} prompts came with {len(params)} SamplingParams.")
    return list(params)


def _adapter_each(adapter: Adapters, count: int) -> list[AdapterChoice]:
    if adapter is None or isinstance(adapter, str):
        return [adapter] * count
    if adapter and all(isinstance(part, tuple) for part in adapter):
        return [list(adapter)] * count  # type: ignore[arg-type]  # several together
    if len(adapter) != count:
        raise InvalidRequest(f"{count} prompts came with {len(adapter)} adapters.")
    return list(adapter)  # type: ignore[arg-type]
