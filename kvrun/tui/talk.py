"""Talk: the conversation of one column and the answer that comes into it; no screen."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from kvrun.chat.commands import Chat
from kvrun.chat.conversation import Conversation, Message
from kvrun.chat.printable import printable
from kvrun.chat.session import Answering, describe
from kvrun.errors import KvrunError
from kvrun.runtime.engine.request import AdapterChoice
from kvrun.runtime.sampling.params import SamplingParams

BASE = "base"
WIDE = 52  # cells from which a column has room for all words of its counts


class Source(Protocol):
    """Who answers: the engine of this machine, or a server."""

    @property
    def name(self) -> str: ...

    async def ask(
        self, messages: list[dict[str, str]], params: SamplingParams, adapter: AdapterChoice = None
    ) -> Answering: ...


@dataclass(frozen=True)
class Speaker:
    """Who answers in a column: an adapter with its scale, or none, on a source."""

    adapter: str | None = None
    scale: float = 1.0

    @property
    def label(self) -> str:
        scale = "" if self.scale == 1 else f" ×{self.scale:g}"
        return (self.adapter or BASE) + scale

    @property
    def request(self) -> AdapterChoice:
        """As a request names it."""
        if self.adapter is None or self.scale == 1:
            return self.adapter
        return [(self.adapter, self.scale)]


class Talk:
    """`arrived` holds what has come since the screen took it; `ended` is called after an answer.

    `gate` is set once the source can be asked; what is asked before waits for it.
    """

    def __init__(
        self,
        source: Source,
        chat: Chat,
        speaker: Speaker,
        *,
        gate: asyncio.Event,
        ended: Callable[["Talk"], None] = lambda talk: None,
    ) -> None:
        self.source = source
        self.chat = chat
        self.speaker = speaker
        self.linked = True
        self.arrived: list[str] = []
        self.reply: Answering | None = None
        self.error: KvrunError | None = None
        self.stopped = False
        self.turn = 0  # answers asked for so far
        self._gate = gate
        self._ended = ended
        self._task: asyncio.Task[None] | None = None
        self._began = 0.0

    @property
    def conversation(self) -> Conversation:
        return self.chat.conversation

    @property
    def busy(self) -> bool:
        """Whether an answer is waited for or comes."""
        return self._task is not None

    @property
    def label(self) -> str:
        return self.speaker.label

    @property
    def request_id(self) -> str | None:
        """The engine's request that answers now."""
        request = getattr(self.reply, "request", None)
        return request.id if request is not None and self.busy else None

    @property
    def last_answer(self) -> Message | None:
        branch = self.conversation.branch()
        return next((m for m in reversed(branch) if m.role == "assistant"), None)

    @property
    def last_question(self) -> Message | None:
        branch = self.conversation.branch()
        return next((m for m in reversed(branch) if m.role == "user"), None)

    def become(self, speaker: Speaker, source: Source, gate: asyncio.Event) -> None:
        """Let somebody else answer."""
        self.speaker, self.source, self._gate = speaker, source, gate

    # -- asking -----------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Ask; a question that never got an answer gives way to the new one."""
        branch = self.conversation.branch()
        if branch and branch[-1].role == "user":
            with suppress(KvrunError):  # it may have answers on other branches
                self.conversation.undo()
        self.conversation.add("user", text)
        self._start()

    def again(self) -> None:
        """Have the last question answered again. Raises InvalidRequest without one."""
        self.conversation.again()
        self._start()

    def edit(self, message_id: int, text: str) -> None:
        """Ask a question in other words, on a branch of its own."""
        self.conversation.edit(message_id, text)
        self._start()

    def switch(self, step: int, message_id: int | None = None) -> bool:
        """Go to another version of a message, by default the last that has any."""
        branch = self.conversation.branch()
        ids = [m.id for m in branch] if message_id is None else [message_id]
        for one in reversed(ids):
            versions = [m.id for m in self.conversation.siblings(one)]
            if len(versions) > 1:
                place = versions.index(one) + step
                self.conversation.switch(versions[place % len(versions)])
                return True
        return False

    def stop(self) -> None:
        """End the answer that comes; what has arrived of it stays."""
        if self._task:
            self.stopped = True
            self._task.cancel()

    async def finished(self) -> None:
        """Wait until no answer is on its way."""
        while self._task:
            await asyncio.wait([self._task])

    def _start(self) -> None:
        self.arrived.clear()
        self.reply = self.error = None
        self.stopped = False
        self.turn += 1
        self._began = time.perf_counter()
        self._task = asyncio.create_task(self._answer())

    async def _answer(self) -> None:
        try:
            await self._gate.wait()
            prompt, params = self.conversation.prompt(), self.chat.settings.params()
            self.reply = reply = await self.source.ask(prompt, params, self.speaker.request)
            async for _, piece in reply:
                self.arrived.append(printable(piece))
        except KvrunError as error:
            self.error = error
        except asyncio.CancelledError:
            self.stopped = True
        finally:
            self._task = None
            self._keep()
            self._ended(self)

    def _keep(self) -> None:
        if self.reply is not None and self.reply.text:
            meta: dict[str, Any] = {**describe(self.reply), "speaker": self.label}
            self.conversation.add("assistant", self.reply.text, **meta)

    # -- what the column says of it ----------------------------------------------------------

    def take(self) -> str:
        """What has arrived since the last call."""
        text = "".join(self.arrived)
        self.arrived.clear()
        return text

    def line(self, width: int = 80) -> str:
        """Counts and times of the answer that comes, else of the last one."""
        if self.busy and (self.reply is None or not self.reply.tokens):
            what = "waiting" if self._gate.is_set() else "engine starts"
            return f"● {what} {time.perf_counter() - self._began:.0f} s"
        if self.busy and self.reply is not None:
            return "● " + summary(describe(self.reply), running=True, short=width < WIDE)
        answer = self.last_answer
        return summary(answer.meta, short=width < WIDE) if answer else ""


def summary(meta: Any, *, running: bool = False, short: bool = False) -> str:
    """The counts and times of an answer: "97 tok · 40.8 tok/s · first 0.08 s · stop".

    Shorter: "97t 41/s 0.08s stop".
    """
    parts = []
    if meta.get("completion_tokens") is not None:
        parts.append(f"{meta['completion_tokens']}" + ("t" if short else " tok"))
    if rate := meta.get("tokens_per_second"):
        parts.append(f"{rate:.0f}/s" if short else f"{rate:.1f} tok/s")
    if (first := meta.get("first_token_seconds")) is not None:
        parts.append(f"{first:.2f}s" if short else f"first {first:.2f} s")
    if not running and meta.get("finish_reason"):
        parts.append(str(meta["finish_reason"]))
    return (" " if short else " · ").join(parts)
