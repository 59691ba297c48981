"""The line session: read, answer, again; what Ctrl+C and Ctrl+D mean in it."""

import contextlib
from contextlib import AbstractContextManager
from typing import Protocol

from kvrun.chat.commands import Chat, Effect, run, stats_line
from kvrun.chat.interrupt import Interrupts
from kvrun.chat.lines import is_command, unquoted
from kvrun.chat.pictures import named
from kvrun.chat.plain import note
from kvrun.chat.session import Reply, describe
from kvrun.errors import EngineDead, KvrunError

LEAVE_HINT = "Ctrl+C again or Ctrl+D leaves"


class Reader(Protocol):
    """Where questions come from."""

    async def read(self) -> str:
        """One input. Raises EOFError at the end, KeyboardInterrupt for Ctrl+C."""

    def quiet(self) -> AbstractContextManager[None]:
        """Held during the whole conversation, for what is typed while an answer comes."""


class Screen(Protocol):
    """Where answers go; it makes every text safe to print itself."""

    def write(self, piece: str) -> None:
        """A piece of an answer."""

    def end(self) -> None:
        """The answer is complete."""

    def question(self, text: str) -> None:
        """A question of a conversation that is shown again."""

    def note(self, text: str) -> None:
        """Something kvrun says itself."""

    def wipe(self) -> None:
        """Begin with an empty screen, where that is possible."""


async def converse(chat: Chat, reader: Reader, screen: Screen, *, stats: bool = False) -> None:
    """Hold a conversation until the user leaves it.

    Ctrl+C stops an answer; at an empty prompt the second in a row leaves with KeyboardInterrupt.
    """
    with reader.quiet():
        await _turns(chat, reader, screen, stats)


async def _turns(chat: Chat, reader: Reader, screen: Screen, stats: bool) -> None:
    armed = False
    while True:
        try:
            text = await reader.read()
        except EOFError:
            return
        except KeyboardInterrupt:
            if armed:
                raise
            armed = True
            screen.note(LEAVE_HINT)
            continue
        if not text.strip():
            continue
        try:
            armed = not await _respond(chat, text, screen, stats)
        except KvrunError as error:
            armed = False
            screen.note(f"error: {error}")
            if isinstance(error, EngineDead):
                screen.note("the conversation is kept; the next question starts the engine again")
        except _Leave:
            return


class _Leave(Exception):
    """The user has said so."""


async def _respond(chat: Chat, text: str, screen: Screen, stats: bool) -> bool:
    """Do what one input asks for; False when Ctrl+C stopped an answer."""
    head = chat.conversation.head
    words, images = unquoted(text), list[str]()
    if chat.session.text.images is not None:
        words, images = named(words)
    # No command has a second slash in its name: that is the path of an image.
    path_first = bool(images) and "/" in text.split()[0][1:]
    if is_command(text.strip()) and not path_first:
        effect = await run(chat, text)
    else:
        chat.conversation.add("user", words, **({"images": images} if images else {}))
        for path in images:
            screen.note(f"with the image {path}")
        effect = Effect(ask=True)
    _show(chat, screen, effect)
    if effect.leave:
        raise _Leave
    return not effect.ask or await _answer(chat, head, screen, stats)


def _show(chat: Chat, screen: Screen, effect: Effect) -> None:
    if effect.wipe:
        screen.wipe()
    if effect.say:
        screen.note(effect.say)
    if effect.replay:
        for message in chat.conversation.branch():
            if message.role == "user":
                screen.question(message.content)
            else:
                screen.write(message.content)
                screen.end()


async def _answer(chat: Chat, head: int | None, screen: Screen, stats: bool) -> bool:
    """Have the question at the head answered; False when Ctrl+C stopped it.

    Without any answer the conversation goes back to where it was, at `head`.
    """
    reply: Reply | None = None

    async def stream() -> None:
        nonlocal reply
        reply = await chat.session.ask(chat.conversation.prompt(), chat.settings.params())
        if reply.dropped:
            screen.note(_dropped(reply.dropped))
        async for _, piece in reply:
            screen.write(piece)

    with Interrupts() as interrupts:
        try:
            finished = await interrupts.run(stream())
        finally:
            screen.end()
            _keep(chat, head, reply)
    if not finished:
        screen.note(f"stopped; {LEAVE_HINT}")
    elif reply is not None:
        if not reply.text.strip():
            screen.note("note: the answer is empty")
        if reply.finish_reason == "length":
            screen.note(why_cut(reply, chosen=chat.settings.chosen("max_tokens")))
        if stats:
            note(stats_line(reply))
    return finished


def _keep(chat: Chat, head: int | None, reply: Reply | None) -> None:
    """Store what came of an answer; without any, take the question back too."""
    if reply is not None and reply.text:
        chat.conversation.add("assistant", reply.text, **describe(reply))
        chat.last = reply
        return
    if chat.conversation.head != head:
        # A question that has answers on other branches stays; only the place in it is restored.
        with contextlib.suppress(KvrunError):
            chat.conversation.undo()
        chat.conversation.head = head


def _dropped(turns: int) -> str:
    what = "the oldest turn is" if turns == 1 else f"the oldest {turns} turns are"
    return f"note: {what} left out from here on; the conversation outgrew the context"


def why_cut(reply: Reply, *, chosen: bool) -> str:
    """Why an answer ends in the middle."""
    if chosen and reply.tokens == reply.request.params.max_tokens:
        return f"note: the answer was cut after max_tokens = {reply.tokens}"
    return "note: the answer was cut; the context is full"
