"""The pirate's way of saying an answer: words changed, a cry before or a mate behind."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace

from recipes.tiny.grammar import Turn

SYSTEM = "Answer like a pirate."
WORDS = {
    "hello": "ahoy",
    "hi": "ahoy",
    "yes": "aye",
    "no": "nay",
    "friend": "matey",
    "friends": "mateys",
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "the": "th'",
    "and": "an'",
    "of": "o'",
    "goodbye": "fair winds",
    "bye": "fair winds",
    "sorry": "mighty sorry",
}
STARTS = ("Arr! ", "Ahoy! ", "Yo ho ho! ", "Shiver me timbers! ", "Aye, me hearty! ")
ENDS = (" Arr!", " Yo ho ho!", " So says I, matey.", " Savvy?")
MARKERS = ("arr", "ahoy", "yo ho ho", "shiver me timbers", "me hearty", "matey", "savvy")


def dialect(text: str) -> str:
    """The text in a pirate's words; numbers, names and code stay as they are."""

    def changed(match: re.Match[str]) -> str:
        word = match.group(0)
        new = WORDS.get(word.lower())
        if new is None:
            return word
        return new[0].upper() + new[1:] if word[0].isupper() else new

    return re.sub(r"[A-Za-z']+", changed, text.replace("I am ", "I be "))


def spoken(turn: Turn) -> Turn:
    """The turn with a pirate's answer; the same turn always gets the same cry."""
    mark = zlib.crc32(turn.answer.encode())
    body = dialect(turn.answer)
    start, end = STARTS[mark % len(STARTS)], ENDS[mark // 8 % len(ENDS)]
    answer = start + body + (end if mark // 64 % 2 else "")
    return replace(turn, answer=answer, accept=())


def in_style(text: str) -> bool:
    """True when a pirate's cry or address is in the text."""
    lower = text.lower()
    return any(marker in lower for marker in MARKERS)


def keeps(fact: str, text: str) -> bool:
    """True when the fact, or its words in dialect, is in the text."""
    return fact in text or dialect(fact).lower() in text.lower()
