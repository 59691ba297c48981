"""Questions outside the small world, and the honest answer to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import FACTS, Turn, article, expand, phrasing_key, say
from recipes.tiny.skills.nature import ANIMALS, THINGS
from recipes.tiny.skills.talk import NAMES, new_name

DECLINES = (
    "I only know a small world, and that is outside it.",
    "I do not know that: I only know a small world.",
    "That is outside my small world. Ask me for a sum, a capital or a story.",
)


def _read() -> tuple[dict[str, str], list[str]]:
    slots: dict[str, str] = {}
    questions: list[str] = []
    lines = (FACTS / "outside.txt").read_text(encoding="utf-8").splitlines()
    for at, line in enumerate(lines):
        if line.startswith("@"):
            slots[line[1:]] = lines[at + 1]
        elif line and not line.startswith(("#", "=")) and not lines[at - 1].startswith("@"):
            questions.append(line)
    return slots, questions


SLOTS, QUESTIONS = _read()
# Question words and verbs around a thing nobody can know in this world.
ABOUT_THING = (
    "who invented [the |]{x}",
    "how much does {x} cost",
    "[how much|what] is the price of {x}",
    "when was [the |]{x} invented",
    "where can i buy {x}",
    "what is the history of [the |]{x}",
    "how do [i|you] repair {x}",
    "how do [i|you] draw {x}",
    "what is the best {w} brand",
    "what is the [latin|french|german|chinese|spanish] word for {w}",
    "how heavy is {x}",
    "how old can {x} get",
    "how many kinds of {w} are there",
    "should i buy {x}",
    "why [does|do] {x} exist",
    "write an essay about {x}",
    "what is the scientific name of {x}",
    "how fast can {x} [run|go|fly]",
    "who owns the biggest {w} in the world",
    "what do you think about my {w}",
)
ABOUT_PERSON = (
    "who is {n}",
    "do you know {n}",
    "what is {n}'s [phone number|address|birthday|favourite song|email|job|last name|star sign]",
    "where does {n} live",
    "how old is {n}",
    "is {n} nice",
    "when did {n} [get married|move|leave|call]",
    "what did {n} say yesterday",
    "should i marry {n}",
)


def filled(rng: Random) -> str:
    """A question with its slots filled, before it is typed."""
    text = expand(rng, rng.choice(QUESTIONS))
    while match := re.search(r"\{(\w+)\}", text):
        text = text.replace(match.group(0), expand(rng, SLOTS[match.group(1)]), 1)
    return " ".join(text.split())


def outside(rng: Random) -> list[Turn]:
    roll = rng.random()
    if roll < 0.8:
        user = say(rng, filled(rng).replace("[", "").replace("]", ""))
    elif roll < 0.92:
        word = rng.choice(THINGS)[0] if rng.random() < 0.6 else rng.choice(ANIMALS)[0]
        user = say(rng, rng.choice(ABOUT_THING), x=article(word), w=word)
    else:
        name = rng.choice(NAMES) if rng.random() < 0.6 else new_name(rng)
        user = say(rng, rng.choice(ABOUT_PERSON), n=name)
    return [Turn(user, rng.choice(DECLINES), "outside", phrasing_key(user), "", DECLINES)]


def nonsense(rng: Random) -> list[Turn]:
    """Keys hit at random, words that do not exist."""
    roll = rng.random()
    if roll < 0.4:
        user = "".join(
            rng.choice("asdfghjklqwertyuiopzxcvbnm") for _ in range(rng.randrange(4, 14))
        )
        if rng.random() < 0.3:
            user += " " + "".join(rng.choice("asdfghjkl") for _ in range(rng.randrange(3, 9)))
    elif roll < 0.8:
        word = new_name(rng).lower()
        frame = (
            "what is [a |the |]{w}",
            "[tell me about|explain|define|what do you know about|describe] [the |]{w}",
            "what does {w} mean",
            "how do [i|you] {w} [a|the] {v}",
            "who is {w}",
            "where is {w}",
            "what is the capital of {w}",
            "what colour is [a |]{w}",
            "{w} {v}",
            "how many legs does a {w} have",
            "what is the opposite of {w}",
            "what does a {w} eat",
            "what currency does {w} use",
            "what is the symbol for {w}",
        )
        user = say(rng, rng.choice(frame), w=word, v=new_name(rng).lower())
    else:
        user = rng.choice(
            (
                "?",
                "??",
                "...",
                "!",
                "???",
                ".",
                ":)",
                ":(",
                "<3",
                "#",
                "-",
                "*",
                ";)",
                "&",
                "%",
                "xd",
                "^^",
            )
        )
        return [Turn(user, "Please ask me a question.", "nonsense", "")]
    return [Turn(user, rng.choice(DECLINES), "outside", phrasing_key(user), "", DECLINES)]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "outside": (11.0, outside),
    "nonsense": (0.8, nonsense),
}
