"""One streamed completion of an OpenAI-compatible server: what is asked, and when what came."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from kvrun.bench.workloads import Prompt
from kvrun.errors import InvalidRequest, KvrunError, NotFound, Unreachable
from kvrun.http import Address, BadReply, Client, describe, events, said

COMPLETIONS, CHAT = "/completions", "/chat/completions"
KINDS = {"completions": COMPLETIONS, "chat": CHAT}


@dataclass(frozen=True)
class Route:
    """Where completions are asked for: "chat" takes messages, "completions" texts or ids."""

    address: Address
    path: str
    chat: bool

    @classmethod
    def of(cls, url: str, kind: str | None = None) -> "Route":
        """Of a server's URL, with or without /v1, or of the route itself.

        Raises InvalidRequest for what is no URL, and for a kind that contradicts it.
        """
        if kind is not None and kind not in KINDS:
            raise InvalidRequest(f"--api is '{kind}'.", hint=f"one of: {', '.join(KINDS)}")
        address = Address.of(url)
        for name, end in (("chat", CHAT), ("completions", COMPLETIONS)):
            if address.path.endswith(end):
                if kind not in (None, name):
                    raise InvalidRequest(f"--api {kind} contradicts {url}.")
                return cls(address, address.path, name == "chat")
        base = address.path if address.path.endswith("/v1") else f"{address.path}/v1"
        return cls(address, base + KINDS[kind or "completions"], kind == "chat")

    @property
    def models_path(self) -> str:
        """Where the server lists its models."""
        return self.path.removesuffix(CHAT if self.chat else COMPLETIONS) + "/models"


@dataclass
class Outcome:
    """What came of one request; times are of `time.perf_counter`, 0 for what never was.

    `by_usage` says that the server has counted the tokens itself; otherwise every piece of text
    counts as one. `cached_tokens` are those of the prompt that it says it had kept from before.
    `reached` says that it has answered at all, be it with an error.
    """

    input_tokens: int = 0
    cached_tokens: int = 0
    asked_tokens: int = 0  # of the answer
    output_tokens: int = 0
    by_usage: bool = False
    reached: bool = False
    sent: float = 0.0
    times: list[float] = field(default_factory=list)  # of pieces of text
    finished: float = 0.0  # when the server said why the answer ends
    ended: float = 0.0
    error: str = ""

    @property
    def ttft(self) -> float:
        """Seconds to the first piece of text."""
        return self.times[0] - self.sent

    @property
    def e2el(self) -> float:
        """Seconds to the end."""
        return self.ended - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds for each token after the first; None where there is none."""
        if self.output_tokens < 2:
            return None
        return (self.e2el - self.ttft) / (self.output_tokens - 1)

    @property
    def short(self) -> bool:
        """Whether it has fewer tokens than were asked for, by the server's own count."""
        return self.by_usage and self.output_tokens < self.asked_tokens

    @property
    def itl(self) -> list[float]:
        """Seconds between pieces of text; one may hold several tokens."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]


@dataclass(frozen=True)
class Asker:
    """Asks one route for one model. `ignore_eos` is no field of OpenAI's own."""

    client: Client
    route: Route
    model: str
    ignore_eos: bool = True
    timeout: float = 600.0

    async def ask(self, prompt: Prompt, output_tokens: int) -> Outcome:
        """Stream one answer. What goes wrong is the outcome's `error`, never an exception."""
        known = 0 if isinstance(prompt, str) else len(prompt)
        outcome = Outcome(input_tokens=known, asked_tokens=output_tokens)
        body = json.dumps(self._body(prompt, output_tokens)).encode()
        outcome.sent = time.perf_counter()
        try:
            async with asyncio.timeout(self.timeout):
                await self._stream(body, outcome)
        except TimeoutError:
            outcome.error = f"no end after {self.timeout:g} s"
        except (OSError, EOFError, ValueError) as error:
            outcome.error = describe(error)
        except (AttributeError, TypeError, KeyError):
            outcome.error = "an event has not the form of OpenAI's"
        outcome.ended = time.perf_counter()
        if outcome.output_tokens and outcome.finished and not outcome.times:
            outcome.times.append(outcome.finished)  # of special tokens alone, or half a character
        if not outcome.times and not outcome.error:
            outcome.error = "the answer holds no text"
        return outcome

    def _body(self, prompt: Prompt, output_tokens: int) -> dict[str, Any]:
        content: dict[str, Any] = {"prompt": prompt}
        if self.route.chat:
            content = {"messages": [{"role": "user", "content": prompt}]}
        body = {
            "model": self.model, **content, "max_tokens": output_tokens, "temperature": 0,
            "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip
        return body | ({"ignore_eos": True} if self.ignore_eos else {})

    async def _stream(self, body: bytes, outcome: Outcome) -> None:
        async with self.client.request("POST", self.route.path, body) as response:
            outcome.reached = True
            if response.status != 200:
                outcome.error = f"HTTP {response.status}: {said(await response.read())}"
                return
            if "event-stream" not in response.headers.get("content-type", ""):
                outcome.error = "the answer is no stream of events"
                return
            ended = False
            async for data in events(response):
                if data == b"[DONE]":
                    ended = True
                elif not outcome.error:
                    ended = self._take(data, outcome) or ended
            if not ended and not outcome.error:
                outcome.error = "the stream ended in the middle of the answer"

    def _take(self, data: bytes, outcome: Outcome) -> bool:
        """Note one event; True when it carries the reason why the answer ends."""
        now = time.perf_counter()
        event = json.loads(data)
        if not isinstance(event, dict):
            raise BadReply("an event is no JSON object")
        if event.get("error"):
            outcome.error = said(data)
        usage = event.get("usage")
        if isinstance(usage, dict):
            outcome.by_usage = True
            outcome.input_tokens = int(usage.get("prompt_tokens") or outcome.input_tokens)
            outcome.output_tokens = int(usage.get("completion_tokens") or 0)
            details = usage.get("prompt_tokens_details") or {}
            outcome.cached_tokens = int(details.get("cached_tokens") or 0)
        choices = event.get("choices") or []
        if not choices:
            return False
        if self._is_text(choices[0]):
            outcome.times.append(now)
            outcome.output_tokens += not outcome.by_usage
        if choices[0].get("finish_reason") is not None:
            outcome.finished = now
        return bool(outcome.finished)

    def _is_text(self, choice: dict[str, Any]) -> bool:
        """Whether a piece of the answer came: a chat begins with a role, and that is none."""
        if self.route.chat:
            delta = choice.get("delta") or {}
            names = ("content", "reasoning_content", "reasoning", "tool_calls")
            return any(delta.get(name) for name in names)
        return bool(choice.get("text"))


async def first_model(client: Client, route: Route) -> str:
    """The first model a server lists. Raises Unreachable, NotFound, or what `refused` gives."""
    status, body = await _get(client, route.models_path)
    if status != 200:
        raise refused(f"HTTP {status}: {said(body)}", f"{client.address}{route.models_path}")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise NotFound(
            f"{client.address}{route.models_path} lists no model.", hint="name it: --model NAME"
        ) from error


async def _get(client: Client, path: str) -> tuple[int, bytes]:
    try:
        async with asyncio.timeout(30), client.request("GET", path) as response:
            return response.status, await response.read()
    except (OSError, EOFError, BadReply) as error:
        raise unreachable(client.address, describe(error)) from error


def unreachable(address: Address, cause: str) -> Unreachable:
    """The error of a server that cannot be talked to."""
    hint = "check the URL; `kvrun serve` starts a server on http://127.0.0.1:3000"
    if "SSL" in cause:
        hint = "check that the server speaks https there, and that its certificate is known here"
    return Unreachable(f"no answer from {address}.", cause=cause, hint=hint)


def refused(error: str, where: str) -> KvrunError:
    """The error of a request that a server has answered otherwise than with text."""
    if error.startswith("HTTP 404"):
        return NotFound(
            f"{where} is not there, or its model is not.",
            cause=error,
            hint="check the path, --api and --model",
        )
    if error.startswith(("HTTP 401", "HTTP 403")):
        return InvalidRequest(f"{where} wants a key.", cause=error, hint="--api-key KEY")
    if error.startswith("HTTP 503"):
        return KvrunError(f"{where} is not ready.", cause=error, hint="it may still load its model")
    if error.startswith("HTTP 4") and "context" in error.lower():
        hint = "shorter prompts or answers, or a server with more context for each request"
        return InvalidRequest(f"{where} has no room for the request.", cause=error, hint=hint)
    if error.startswith("HTTP 4"):
        hint = "--text for servers that take no ids, --vocab N for a small vocabulary, "
        hint += "--no-ignore-eos for those that know OpenAI's own fields only"
        return InvalidRequest(f"{where} refuses the request.", cause=error, hint=hint)
    return KvrunError(f"{where} has not answered the first request.", cause=error)
