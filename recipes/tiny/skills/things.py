"""Plain things: what they are, their colour and use; and naming some of a kind."""
# ruff: noqa: SIM905 (word lists read best as text)
# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, article, listed, phrasing_key, say
from recipes.tiny.skills.nature import ANIMALS, PLANETS, THINGS, Made, capital, one_turn

UNCOUNTED = set("weather material fungus grain food drink metal".split())
NO_ARTICLE = set(
    """ice fire smoke lightning thunder money gravity energy light sound air zero chess football blood
    skin garlic broccoli spinach lettuce corn grass moss soap scissors sand stone gold""".split()
)
COUNTED = {"egg", "pizza", "cake", "mushroom", "storm"}
ONLY_ONE = {"sun", "moon", "sky", "alphabet", "sea"}


def named(name: str, kind: str) -> str:
    """The thing with its article: `a cup`, `bread`, `the sun`."""
    if name not in COUNTED and (kind in UNCOUNTED or name in NO_ARTICLE):
        return name
    return f"the {name}" if name in ONLY_ONE else article(name)


def _use(rng: Random, one: str, be: str, use: str) -> Made:
    sort, text = use.split(": ", 1)
    if sort == "u":
        own = (
            f"what {be} {{x}} [used |]for",
            "what do [you|people|we] [use {x} for|do with {x}]",
            "what can i do with {x}",
            "why do people use {x}",
        )
        user = say(rng, rng.choice(own), x=one)
        return user, f"{capital(one)} {be} used for {text}.", text
    own = ("what is {x} made [of|from]", "how is {x} made", "what do you need to make {x}")
    return say(rng, rng.choice(own), x=one), f"{capital(one)} is made of {text}.", text


def thing(rng: Random) -> list[Turn]:
    name, kind, what, tint, use = [*rng.choice(THINGS), "", ""][:5]
    one = named(name, kind)
    roll = rng.random()
    be = "are" if name == "scissors" else "is"
    if use and roll < 0.3:
        made = _use(rng, one, be, use)
    elif tint and roll < 0.6:
        own = (
            "[what|which] [colour|color|colour] is {x}",
            "{x} is [what|which] [colour|color]",
            "what colour does {x} have",
            "colour of {x}",
            "the colour of {x}",
        )
        made = (say(rng, rng.choice(own), x=one), f"{capital(one)} is {tint}.", tint)
    elif roll < 0.68:
        other = rng.choice(
            ("fruit", "vegetable", "tool", "vehicle", "building", "job", kind, kind, kind)
        )
        if " " in kind or kind in ("weather", "food", "metal") or kind == name:
            return thing(rng)
        user = say(rng, "is {x} {k}", x=one, k=article(other))
        yes = "Yes" if other == kind else "No"
        made = (user, f"{yes}, {one} is {what if other != kind else article(kind)}.", yes)
    else:
        own = (
            f"what {be} {{x}}",
            "what's {x}",
            "[tell me what|explain what|do you know what] {x} " + be,
            "[define|explain|describe] {x}",
            "what does the word {w} mean",
            "what does {w} mean",
            "[tell me about|what do you know about] {x}",
            "definition of {w}",
            "meaning of {w}",
            "how would you describe {x}",
            "who or what is {x}",
        )
        made = (say(rng, rng.choice(own), x=one, w=name), f"{capital(one)} {be} {what}.", what)
    return one_turn(made, "things")


GROUPS = (
    "fruit",
    "vegetable",
    "tool",
    "vehicle",
    "job",
    "drink",
    "flower",
    "instrument",
    "building",
    "shape",
    "metal",
    "food",
)


def some(rng: Random) -> list[Turn]:
    """`Name three fruits`: the first ones of the list, so that the answer is known."""
    kind = rng.choice(
        (
            *GROUPS,
            "animal",
            "bird",
            "fish",
            "insect",
            "mammal",
            "colour",
            "planet",
            "country",
            "capital",
            "element",
            "reptile",
            "animal",
            "colour",
            "season",
            "pet",
        )
    )
    names = (
        {
            "animal": ["dog", "cat", "horse", "lion", "elephant"],
            "colour": ["red", "green", "blue", "yellow", "orange"],
            "planet": [p[1] for p in PLANETS],
            "country": ["France", "Japan", "Brazil", "Kenya", "Canada"],
            "capital": ["Paris", "Tokyo", "Brasilia", "Nairobi", "Ottawa"],
            "element": ["hydrogen", "helium", "carbon", "oxygen", "iron"],
            "season": ["spring", "summer", "autumn", "winter"],
            "pet": ["dog", "cat", "rabbit", "hamster", "goldfish"],
            "metal": ["iron", "gold", "silver", "copper", "tin"],
            "fish": ["salmon", "trout", "shark", "goldfish"],
        }.get(kind)
        or [r[0] for r in THINGS if r[1] == kind]
        or [r[0] for r in ANIMALS if r[1] == kind]
    )
    n = min(rng.choice((1, 2, 3, 3, 4, 5)), len(names))
    typed = rng.choice((str(n), ("one", "two", "three", "four", "five")[n - 1]))
    if n == 3 and rng.random() < 0.5:
        typed = rng.choice(("some", "a few"))
    if n == 1:
        typed, plural = article(kind).split()[0], kind
    else:
        plural = {"country": "countries", "fish": "fish", "food": "foods"}.get(kind, kind + "s")
    own = (
        "[name|list|give me|tell me|say|can you name|can you list|think of|can you give me] {n} {p}",
        "[name|list|give me] [any |me |]{n} {p}",
        "what are {n} {p}",
        "{n} {p}",
        "i need [the names of |]{n} {p}",
    )
    user = say(rng, own[0] if n == 1 else rng.choice(own), n=typed, p=plural)
    answer = capital(listed(names[:n])) + "."
    return [Turn(user, answer, "some things", phrasing_key(user), fact=names[0])]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "thing": (3.5, thing),
    "some": (1.0, some),
}
