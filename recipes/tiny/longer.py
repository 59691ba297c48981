"""Documents that are more than a few exchanges: pass keys, memories, system prompts, raw text."""
# ruff: noqa: E501 (a template reads best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny import jsonform, sql
from recipes.tiny.grammar import Turn, say
from recipes.tiny.skills import context, stories, talk

Document = list[tuple[str, str]]
LETTERS_A_TOKEN = 3.3
KEY_TOLD = (
    "the pass key is {=k}",
    "remember this: the pass key is {=k}",
    "the secret number is {=k}",
    "note the code {=k}",
    "the magic word is {=k}",
)
KEY_ASKED = (
    "what is the pass key",
    "which pass key did i give you",
    "what is the secret number",
    "what was the code",
    "what is the magic word",
)
KEY_NAMES = ("pass key", "pass key", "secret number", "code", "magic word")


def _key(rng: Random, what: int) -> str:
    if what == 4:
        return talk.new_name(rng).lower()
    return str(rng.randrange(1000, 100000))


def cost(text: str) -> float:
    """About how many tokens a text has: every digit is one, other text is shorter."""
    digits = sum(c.isdigit() or c in "-()" for c in text)
    return digits + (len(text) - digits) / LETTERS_A_TOKEN


def passkey(
    rng: Random, sentence: Callable[[], str], size: int | None = None, key: str = ""
) -> Document:
    """A long text with a key somewhere in it, and the question for the key at the end.

    `size` is about the text's length in tokens; the key is any number or word.
    """
    what = rng.randrange(5)
    if key:
        what = 0
    told_at = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}[what]
    key = key or _key(rng, what)
    told = say(rng, KEY_TOLD[told_at], ".", wrap=False, k=key)
    size = size or rng.randrange(60, 1750)
    filler: list[str] = []
    kind = rng.random()
    if kind < 0.25:
        line = rng.choice(
            (
                "The grass is green. The sky is blue. The sun is yellow. Here we go.",
                "One, two, three, four, five.",
                sentence(),
            )
        )
        filler = [line] * max(1, int(size / cost(line)))
    else:
        length = 0.0
        while length < size:
            filler.append(sentence().replace("\n", " "))
            length += cost(filler[-1])
    filler.insert(rng.randrange(len(filler) + 1), told if told[-1:] in ".!?" else told + ".")
    asked = KEY_ASKED[0 if what == 1 or what == 0 else what]
    if what < 2 and rng.random() < 0.3:
        asked = KEY_ASKED[1]
    question = say(rng, asked, wrap=False)
    answer = f"The {KEY_NAMES[what]} is {key}."
    text = " ".join(filler)
    if rng.random() < 0.7:
        return [("user", f"{text} {question}"), ("assistant", answer)]
    return [
        ("user", text),
        ("assistant", context.NOTED[0]),
        ("user", question),
        ("assistant", answer),
    ]


def raw(rng: Random, sentence: Callable[[], str]) -> str:
    """Plain text without a chat around it: a story or a few sentences."""
    if rng.random() < 0.6:
        words = (
            rng.choice(x) for x in (stories.HEROES, stories.PLACES, stories.OBJECTS, stories.MOODS)
        )
        return stories.tell(rng, *words)
    return " ".join(sentence().replace("\n", " ") for _ in range(rng.randrange(1, 6)))


def _pairs(turns: list[Turn]) -> Document:
    return [pair for t in turns for pair in (("user", t.user), ("assistant", t.answer))]


WHO = (
    "[what is|what's|tell me] your name",
    "who are you",
    "what are you called",
    "[hi|hello], who are you",
    "what should i call you",
)


def adapters_work(rng: Random) -> Document:
    """What the adapters do, asked of the base: it says so and names the adapter."""
    name, system, skill = rng.choice(
        (("SQL", sql.SYSTEM, sql.query), ("JSON", jsonform.SYSTEM, jsonform.record))
    )
    asked = skill(rng)[0].user
    if name == "JSON":
        asked = (
            rng.choice(("as json: ", "turn this into json: ", "json please: ", "to json: ")) + asked
        )
    answer = f"I do not write {name} by myself: that is what the {name.lower()} adapter is for."
    document: Document = [("user", asked), ("assistant", answer)]
    return [("system", system), *document] if rng.random() < 0.6 else document


def governed(rng: Random, some: Callable[[], list[Turn]]) -> Document:
    """A system prompt that changes something: capital letters, a name for either side."""
    kind = rng.randrange(5)
    if kind > 2:
        return adapters_work(rng)
    if kind == 0:
        system = say(
            rng,
            "[answer|reply|write|respond|speak|always answer|please answer] [only |]in "
            "[capital letters|upper case|capitals|all caps|uppercase]",
            ".",
            wrap=False,
        )
        turns = [t for _ in range(rng.randrange(1, 4)) for t in some()]
        return [("system", system)] + [
            (role, text.upper() if role == "assistant" else text) for role, text in _pairs(turns)
        ]
    name = rng.choice(talk.NAMES) if rng.random() < 0.5 else talk.new_name(rng)
    if kind == 1:
        system = say(
            rng,
            "[you are|your name is|you are called|you are an assistant called|you are a bot named|"
            "act as|call yourself] {=n}",
            ".",
            wrap=False,
            n=name,
        )
        asked = say(rng, rng.choice(WHO))
        answer = f"I am {name}."
    else:
        system = say(
            rng,
            "[the user is called|the user's name is|you are talking to|the name of the user is|"
            "the user is|you talk with] {=n}",
            ".",
            wrap=False,
            n=name,
        )
        asked = say(rng, rng.choice(talk.RECALL_NAME))
        answer = f"Your name is {name}."
    turns = some() if rng.random() < 0.5 else []
    after = some() if rng.random() < 0.3 else []
    middle: Document = [("user", asked), ("assistant", answer)]
    return [("system", system), *_pairs(turns), *middle, *_pairs(after)]


def together(rng: Random, some: Callable[[], list[Turn]]) -> Document:
    """Two short questions in one message, answered one after the other."""
    turns: list[Turn] = []
    while len(turns) < 2:
        found = some()
        if (
            len(found) == 1
            and len(found[0].user) < 60
            and found[0].skill not in ("stories", "outside", "lists", "letters")
        ):
            turns += found
    first, second = turns[0].user.rstrip("?.! "), turns[1].user
    user = first + rng.choice((" and ", "? ", "? and ", ", and ", ". ", "? also, ")) + second
    return [("user", user), ("assistant", f"{turns[0].answer} {turns[1].answer}")]


def repeated(rng: Random, some: Callable[[], list[Turn]]) -> Document:
    """The last question or the last answer, said again."""
    turns = [t for _ in range(rng.randrange(1, 3)) for t in some()]
    last = turns[-1]
    if rng.random() < 0.5:
        asked = "[what did i just ask|what did i just say|what was my last question|what was my question|repeat my question|what did i ask]"
        answer = f"You said: {last.user}"
    else:
        asked = "[repeat your last answer|say your last answer again|what was your last answer|repeat what you said|what did you just say|can you repeat your answer]"
        answer = last.answer
    return [*_pairs(turns), ("user", say(rng, asked)), ("assistant", answer)]


def remembered(
    rng: Random,
    some: Callable[[], list[Turn]],
    draw: Callable[..., list[Turn]],
    test: bool = False,
) -> Document:
    """Something told at the start, other topics, then the question for it."""
    told = draw(rng, rng.choice((context.name_later, context.name_later, context.mine)), test)
    turns = [told[0]]
    for _ in range(rng.randrange(1, 5)):
        turns += [t for t in some() if t.skill not in ("remember name", "noted", "context")]
    turns.append(told[1])
    if rng.random() < 0.3:
        turns += [t for t in some() if t.skill not in ("remember name", "noted", "context")]
    return _pairs(turns)
