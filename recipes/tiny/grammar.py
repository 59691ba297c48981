"""The phrase grammar: templates with choices become questions as people type them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

FACTS = Path(__file__).parent / "facts"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer.

    `key` is the content that decides whether the turn is held out of training ("" = never held
    out), `fact` the part of the answer that a change of style must keep, `accept` other right
    answers, `words` what a free answer (a story) has to mention.
    """

    user: str
    answer: str
    skill: str
    key: str = ""
    fact: str = ""
    accept: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def held_out(key: str) -> bool:
    """True for the tenth of all contents that training never sees."""
    return key != "" and zlib.crc32(key.encode()) % 10 == 0


def normal(text: str) -> str:
    """The text without case, punctuation and double spaces: the key of a phrasing."""
    kept = "".join(c if c.isalnum() else " " for c in text.lower())
    return " ".join(kept.split())


def phrasing_key(text: str) -> str:
    """The key of a question that is held out by its words; very short ones never are."""
    key = normal(text)
    return key if key.count(" ") >= 2 else ""


Node = str | tuple["Node", ...] | list["Node"]


@cache
def parse(template: str) -> Node:
    """`[a|b [c|d]|]` -> nested nodes: a list is a choice, a tuple a sequence, a str a text."""
    if template.count("[") != template.count("]"):
        raise ValueError(f"unbalanced brackets in template: {template!r}")
    return _sequence(template, 0, top=True)[0]


def _sequence(text: str, at: int, top: bool = False) -> tuple[Node, int]:
    parts: list[Node] = []
    plain = at
    while at < len(text):
        char = text[at]
        if char == "[":
            if at > plain:
                parts.append(text[plain:at])
            options: list[Node] = []
            while True:
                option, at = _sequence(text, at + 1)
                options.append(option)
                if text[at] == "]":
                    break
            parts.append(options)
            at += 1
            plain = at
        elif char in "|]" and not top:
            break
        else:
            at += 1
    if at > plain:
        parts.append(text[plain:at])
    return (parts[0] if len(parts) == 1 else tuple(parts)), at


def expand(rng: Random, template: str) -> str:
    """One random expansion of the template's choices; `{fields}` stay as they are."""
    out: list[str] = []
    stack: list[Node] = [parse(template)]
    while stack:
        node = stack.pop()
        if isinstance(node, str):
            out.append(node)
        elif isinstance(node, list):
            stack.append(node[int(rng.random() * len(node))])
        else:
            stack.extend(reversed(node))
    return "".join(out)


OPENERS = (
    "[hey|hi|hello|ok|okay|so|well|um|hmm|now|alright|please|quick question:|question:|next one:|"
    "one more:|and|also|btw|by the way|yo|tiny|hey tiny|hi tiny|hello there|right|cool|great|"
    "thanks|nice|lol|sorry|excuse me|listen|look|good|ok now|ok so|haha|oh|ah|then|ok then|"
    "let me see|let's see|i wonder|just curious|for fun|my turn|new question:|ok cool|got it]"
)
CLOSERS = (
    "[please|pls|plz|thanks|thank you|for me|mate|friend|if you can|if you know|i forgot|again|"
    "now|then|right now|tiny|quickly|in one line|my friend|buddy|by any chance|exactly|"
    "anyway|though|just asking|for school|for my homework|cheers|today|ok|so|dude|do you know]"
)
ASK = (
    "[what is|what's|whats|what is|wats|what would be|what would|what's|what is|wat is|"
    "what do you think is|what exactly is] {np}",
    "[tell me|can you tell me|could you tell me|please tell me|pls tell me|give me|say|show me|"
    "i need|i want|i'd like|i would like|let me know|work out|find|find me|get me|name|state|"
    "can you give me|could you give me|just tell me|would you tell me|help me with|"
    "i need to know|i want to know|do you know|you know|any idea of|any idea about|"
    "can you work out|can you find|remind me of|what about|how about|how about telling me] {np}",
    "[can you tell me|could you tell me|tell me|do you know|i wonder|i was wondering|"
    "i want to know|i'd like to know|i need to know|let me know|any idea|have you any idea|"
    "please tell me|can you say|would you know|remind me|i forgot|i don't know|explain] what {np} "
    "is",
    "{np}",
    "{np}",
    "{np} [is|is what|equals|would be|is?|=|...]",
    "[my question is|the question is|here is my question|i have a question|question]: what is {np}",
)


def style_of(rng: Random) -> str:
    """How a person types: sentence, plain lower case, lower with marks, shouting."""
    roll = rng.random()
    if roll < 0.42:
        return "sentence"
    if roll < 0.78:
        return "bare"
    if roll < 0.97:
        return "lower"
    return "upper"


def typo(rng: Random, word: str) -> str:
    """One slip of the finger inside the word."""
    at = int(rng.random() * (len(word) - 1))
    kind = rng.random()
    if kind < 0.3:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if kind < 0.6:
        return word[:at] + word[at + 1 :]
    if kind < 0.8:
        return word[: at + 1] + word[at] + word[at + 1 :]
    near = "qwertyuiopasdfghjklzxcvbnm"
    return word[:at] + near[int(rng.random() * 26)] + word[at + 1 :]


SHORT = {"you": "u", "are": "r", "please": "pls", "what": "wat", "your": "ur", "for": "4"}
LONG_PAUSE = ("?", ".", "!", "...")


def slip(rng: Random, text: str) -> str:
    """The text with one or two typos or chat spellings in its longer words."""
    words = text.split(" ")
    for _ in range(1 if rng.random() < 0.75 else 2):
        at = int(rng.random() * len(words))
        word = words[at]
        if word in SHORT and rng.random() < 0.5:
            words[at] = SHORT[word]
        elif len(word) >= 4 and word.isalpha():
            words[at] = typo(rng, word)
    return " ".join(words)


def say(rng: Random, template: str, mark: str = "?", wrap: bool = True, **fields: object) -> str:
    """A question as typed: choices expanded, style and slips applied, fields put in.

    `{name}` follows the style of the sentence, `{=name}` is put in exactly as given. `mark` ends
    the well-kept styles; `wrap=False` leaves out openers and closers.
    """
    text = expand(rng, template)
    if wrap:
        if rng.random() < 0.2:
            text = expand(rng, OPENERS) + (", " if rng.random() < 0.5 else " ") + text
            text = text.replace(":, ", ": ")
        if rng.random() < 0.12:
            text += (", " if rng.random() < 0.3 else " ") + expand(rng, CLOSERS)
    style = style_of(rng)
    if rng.random() < 0.13:
        text = slip(rng, text)
    soft = {k: v for k, v in fields.items() if "{" + k + "}" in text}
    for name, value in soft.items():
        word = str(value)
        if rng.random() < 0.03 and len(word) >= 5 and word.isalpha():
            word = typo(rng, word)
        text = text.replace("{" + name + "}", word)
    text = _styled(rng, text, style, mark)
    for name, value in fields.items():
        if "{=" in text:
            text = text.replace("{=" + name.upper() + "}", str(value))
            text = text.replace("{=" + name + "}", str(value))
    return text


def _styled(rng: Random, text: str, style: str, mark: str) -> str:
    if text and text[-1] in "?!.":
        mark = ""
    if style == "sentence":
        text = text.replace(" i ", " I ").replace(" i'", " I'")
        if text.startswith(("i ", "i'")) or text[:1] != "{":
            text = text[:1].upper() + text[1:]
        return text + mark
    if style == "upper":
        return text.upper() + (mark if rng.random() < 0.6 else mark * 2)
    text = text.lower()
    if style == "bare":
        if rng.random() < 0.5:
            text = text.replace("'", "")
        return text.rstrip("?.!") if mark else text
    return text + (mark if rng.random() < 0.85 else rng.choice((" " + mark, mark * 2, "..")))


def ask(rng: Random, noun_phrase: str, own: Sequence[str] = (), **fields: object) -> str:
    """Ask for a noun phrase in one of the common frames or one of the skill's own."""
    roll = rng.random()
    if own and roll < 0.55:
        return say(rng, own[int(rng.random() * len(own))], **fields)
    frame = ASK[int(rng.random() * len(ASK))]
    if roll > 0.8:
        frame = ASK[0]
    return say(rng, frame.replace("{np}", noun_phrase), **fields)


def table(name: str) -> list[list[str]]:
    """Rows of a fact file: one per line, columns split at `|`, `#` starts a comment."""
    lines = (FACTS / name).read_text(encoding="utf-8").splitlines()
    kept = (line for line in lines if line.strip() and not line.startswith("#"))
    return [[cell.strip() for cell in line.split("|")] for line in kept]


def article(noun: str) -> str:
    """`a dog`, `an owl`."""
    return ("an " if noun[:1].lower() in "aeiou" else "a ") + noun


def listed(items: Sequence[str], last: str = "and") -> str:
    """`a, b and c`."""
    if len(items) < 2:
        return "".join(items)
    return ", ".join(items[:-1]) + f" {last} " + items[-1]
