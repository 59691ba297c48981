"""More of what was said: who is taller, where I put it, my brothers, my last question."""
# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, expand, listed, say
from recipes.tiny.skills.context import NOTED, OBJECTS, PLACES, UNKNOWN, people
from recipes.tiny.skills.context import mine as told_and_asked
from recipes.tiny.skills.talk import NAMES, RECALL_NAME, introduce, new_name

PAIRS = (
    ("taller", "shorter"),
    ("older", "younger"),
    ("faster", "slower"),
    ("bigger", "smaller"),
    ("stronger", "weaker"),
    ("richer", "poorer"),
)


def taller(rng: Random) -> list[Turn]:
    more, less = rng.choice(PAIRS)
    a, b = people(rng, 2)
    told = f"{a} is {more} than {b}"
    if rng.random() < 0.35:
        (c,) = people(rng, 1)
        if c not in (a, b):
            told += f". {b} is {more} than {c}"
            top, low = a, c
            sup = {"bigger": "biggest"}.get(more, more[:-2] + "est")
            bottom = {"slower": "slowest"}.get(less, less[:-2] + "est")
            asked, who = (sup, top) if rng.random() < 0.5 else (bottom, low)
            user = f"{told}. " + say(rng, f"who is the {asked}", wrap=False)
            return [Turn(user, f"{who} is the {asked}.", "context", f"ctx {who}", who)]
    asked, who = (more, a) if rng.random() < 0.5 else (less, b)
    if rng.random() < 0.2:
        question = f"is {b} {more} than {a}"
        answer, who = f"No, {a} is {more} than {b}.", a
    else:
        question = f"who is {asked}"
        answer = f"{who} is {asked}."
    told = told.lower() if rng.random() < 0.3 else told
    return [
        Turn(f"{told}. " + say(rng, question, wrap=False), answer, "context", f"ctx {who}", who)
    ]


def put(rng: Random) -> list[Turn]:
    thing, place = rng.choice(OBJECTS), rng.choice(PLACES)
    own = rng.random() < 0.7
    name = people(rng, 1)[0]
    who = "i" if own else name
    the = rng.choice(("the", "my")) if own else "the"
    told = expand(rng, f"{who} [put|left|placed|hid|dropped] {the} {thing} in the {place}")
    told = told[0].upper() + told[1:] if rng.random() < 0.5 else told
    your = "your" if the == "my" else "the"
    answer = f"{your.capitalize()} {thing} is in the {place}."
    question = say(
        rng,
        f"[where is|where's|where did {who} put|where can i find|where did {who} leave] {the} {thing}",
        wrap=False,
    )
    key = f"put {thing} {place}"
    if rng.random() < 0.6:
        return [Turn(f"{told}. {question}", answer, "context", key, place)]
    return [Turn(told + ".", NOTED[0], "noted", key), Turn(question, answer, "context", key, place)]


def family(rng: Random) -> list[Turn]:
    names = people(rng, rng.randrange(1, 4))
    kin = rng.choice(
        ("brother", "sister", "friend", "child", "dog", "cat", "cousin", "son", "daughter")
    )
    many = {"child": "children"}.get(kin, kin + "s") if len(names) > 1 else kin
    count = ("a", "two", "three")[len(names) - 1]
    told = expand(rng, f"i have {count} {many} [called|named|,] {listed(names)}").replace(" ,", ",")
    key = f"ctx {names[0]}"
    asked = f"[what are my {many} called|what are the names of my {many}|what are my {many}' names]"
    answer = f"Your {many} are called {listed(names)}."
    if len(names) == 1:
        asked = f"[what is my {kin} called|what is the name of my {kin}|what's my {kin}'s name]"
        answer = f"Your {kin} is called {names[0]}."
    elif rng.random() < 0.3:
        asked = f"how many {many} do i have"
        answer = f"You have {count} {many}."
    question = say(rng, asked, wrap=False)
    told = told[0].upper() + told[1:] if rng.random() < 0.5 else told
    if rng.random() < 0.5:
        return [
            Turn(
                f"{told}. {question}",
                answer,
                "context",
                key,
                names[0] if "called" in answer else count,
            )
        ]
    return [
        Turn(told + ".", NOTED[0], "noted", key),
        Turn(question, answer, "context", key, names[0] if "called" in answer else count),
    ]


def at_once(rng: Random) -> list[Turn]:
    """A name or a favourite told and asked for in one breath."""
    if rng.random() < 0.5:
        name = rng.choice(NAMES) if rng.random() < 0.5 else new_name(rng)
        extra = rng.choice(
            ("", "", " and i like fish", " and i am from france", " and i am 30", ", hello")
        )
        told = expand(
            rng,
            f"[my name is|i am called|i'm|i am|hi, i'm|hello, my name is|call me] {name}{extra}",
        )
        user = f"{told}{rng.choice(('. ', ', ', '. '))}" + say(
            rng, rng.choice(RECALL_NAME), wrap=False
        )
        return [Turn(user, f"Your name is {name}.", "remember name", f"name {name}", name)]
    first, second = told_and_asked(rng)
    joined = first.user.rstrip(".") + ". " + second.user
    return [Turn(joined, second.answer, "context", second.key, second.fact)]


def unknown(rng: Random) -> list[Turn]:
    """Asked for something that was never told."""
    noun = rng.choice(
        [
            "my favourite colour",
            "my favourite food",
            "my age",
            "my dog's name",
            "my sister's name",
            "the password",
            "the code",
            "my lucky number",
            "my favourite animal",
            "the secret word",
            "my brother's name",
            "my birthday",
            "my shopping list",
            "my favourite number",
            "my cat's name",
            "my phone number",
        ]
    )
    user = say(rng, "[what is|what's|tell me|do you know|do you remember|what was] " + noun)
    return [Turn(user, UNKNOWN, "context", "", UNKNOWN)]


def introduced(rng: Random) -> list[Turn]:
    """A greeting with a name, nothing else."""
    return introduce(rng)


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "taller": (0.8, taller),
    "put": (0.9, put),
    "family": (0.7, family),
    "at_once": (1.0, at_once),
    "unknown": (0.4, unknown),
    "introduced": (0.2, introduced),
}
