"""Question files: `= id`, lines of question templates, `> ` answers; read once, asked at random."""
# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from recipes.tiny.grammar import FACTS, Turn, ask, parse, phrasing_key, say

TERM = (
    "[what is|what's|whats|what are|explain|define|describe|tell me about|what does one mean by|"
    "what do you know about|can you explain|could you explain|please explain|i want to know about|"
    "teach me|give me a definition of|what on earth is|what exactly is|explain to me|"
    "how would you explain|in simple words, what is|tell me what is|what about|and what is] {x}",
    "what [does|do] {x} mean",
    "[tell me|explain|do you know|can you explain|can you tell me|i wonder] what {x} [is|means]",
    "[what is|explain] {x} [in kvrun|in simple words|in one sentence|to me|like i am five|"
    "in a language model|in llms|simply|briefly|for a beginner]",
    "{x}",
    "what is {x} and [why is it useful|what is it for|how does it work|why do i need it|what does it do]",
    "[what is|what's] meant by {x}",
    "[the |]meaning of {x}",
    "definition of {x}",
    "[why do i need|why is there|what is the point of|what is the use of|what is] {x}[ good for| for|]",
    "[how does|how do] {x} work",
    "i don't understand {x}",
    "i've heard of {x}, what is it",
)
DOES = (
    "what does {=x} do",
    "[what is|what's] {=x} [for|good for|used for|]",
    "what does {=x} mean",
    "what happens [if|when] i [type|use|enter|press] {=x}",
    "[tell me about|explain|describe|how do i use|how does|when do i use|help with] {=x}",
    "{=x}",
    "what is the [use|meaning|purpose] of {=x}",
)


@dataclass(frozen=True)
class Entry:
    """Questions that share one set of right answers."""

    name: str
    questions: tuple[tuple[str, str], ...]  # (form, template)
    answers: tuple[str, ...]


def read(name: str) -> list[Entry]:
    """The entries of a question file."""
    found: list[Entry] = []
    lines = (FACTS / name).read_text(encoding="utf-8").splitlines()
    for block in "\n".join(x for x in lines if x and not x.startswith("#")).split("\n= "):
        rows = block.removeprefix("= ").split("\n")
        asked = tuple(_question(row) for row in rows[1:] if not row.startswith("> "))
        answers = tuple(row[2:] for row in rows[1:] if row.startswith("> "))
        found.append(Entry(rows[0], asked, answers))
    return found


def _question(row: str) -> tuple[str, str]:
    for form in ("term", "does", "ask"):
        if row.startswith("{" + form + "} "):
            return form, row.split(" ", 1)[1]
    parse(row)
    return "plain", row


def question(rng: Random, entry: Entry, mark: str = "?") -> str:
    """One way of asking the entry, as typed."""
    form, text = entry.questions[int(rng.random() * len(entry.questions))]
    if form == "term":
        return say(rng, rng.choice(TERM), x=rng.choice(text.split(";")))
    if form == "does":
        return say(rng, rng.choice(DOES), x=rng.choice(text.split(";")))
    if form == "ask":
        return ask(rng, text)
    return say(rng, text, mark)


def turn(rng: Random, entry: Entry, skill: str, mark: str = "?") -> Turn:
    """The entry asked and answered; every listed answer is right."""
    user = question(rng, entry, mark)
    answer = entry.answers[int(rng.random() * len(entry.answers))]
    return Turn(user, answer, skill, phrasing_key(user), fact=answer, accept=entry.answers)
