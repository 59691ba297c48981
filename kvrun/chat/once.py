"""One question, one answer: the answer goes to stdout, everything else to stderr."""

import json
import re
from typing import Any, TextIO

from kvrun.chat.commands import stats_line
from kvrun.chat.interrupt import Interrupts
from kvrun.chat.plain import note
from kvrun.chat.repl import Screen, why_cut
from kvrun.chat.session import Choice, Reply, Session, describe
from kvrun.chat.settings import Settings

# What JSON allows in a string and a terminal obeys all the same.
_C1 = re.compile(r"[\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


async def answer(
    session: Session,
    messages: list[dict[str, Any]],
    settings: Settings,
    screen: Screen | None,
    *,
    stats: bool = False,
) -> Reply:
    """Stream the answer to a screen, or just wait for it when there is none.

    Raises KeyboardInterrupt on the first Ctrl+C, with what had arrived already shown.
    """
    reply = await session.ask(messages, settings.params())

    async def stream() -> None:
        async for _, piece in reply:
            if screen:
                screen.write(piece)

    with Interrupts() as interrupts:
        try:
            finished = await interrupts.run(stream())
        finally:
            if screen:
                screen.end()
    if not finished:
        raise KeyboardInterrupt
    if reply.finish_reason == "length" and screen and not settings.chosen("max_tokens"):
        note(why_cut(reply, chosen=False))
    if stats:
        note(stats_line(reply))
    return reply


def print_json(session: Session, reply: Reply, out: TextIO) -> None:
    """One JSON object on one line; the field names are part of the command's contract."""
    answer: dict[str, Any] = {"model": session.name, "text": reply.text}
    if reply.request.adapter is not None:
        answer["adapter"] = reply.request.adapter
    answer |= describe(reply)
    answer |= {
        "start_seconds": round(session.start_seconds, 4),
        "choices": [_choice(session, choice) for choice in reply.choices],
    }
    line = json.dumps(answer, ensure_ascii=False)
    out.write(_C1.sub(lambda char: f"\\u{ord(char[0]):04x}", line) + "\n")
    out.flush()


def _choice(session: Session, choice: Choice) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "index": choice.index,
        "text": choice.text,
        "completion_tokens": choice.tokens,
        "finish_reason": choice.finish_reason,
    }
    if choice.logprobs:
        plain["logprobs"] = [
            {
                "id": one.token_id,
                "text": _token(session, one.token_id),
                "logprob": one.logprob,
                "top": [
                    {"id": i, "text": _token(session, i), "logprob": value} for i, value in one.top
                ],
            }
            for one in choice.logprobs
        ]
    return plain


def _token(session: Session, token_id: int) -> str:
    return session.text.decode([token_id], skip_special=False)
