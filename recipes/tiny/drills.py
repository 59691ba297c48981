"""Drills: many facts in one text and many questions about them, so that looking up is learnt.

A question such as "who has the hat?" needs three steps at once (the hat of the facts gathers its
owner, the hat of the question finds the hat of the facts, the answer copies the owner), and a
conversation holds one such question among a hundred other words. A drill repeats it densely. Not
more than half of a drill's facts are asked for: what is left over would give answers away.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from recipes.tiny.grammar import article, expand, held_out, say
from recipes.tiny.skills import context

Document = list[tuple[str, str]]
Drill = tuple[Document, list["Fact"]]


@dataclass(frozen=True, slots=True)
class Fact:
    """One fact as told, a question and an answer from its owner ahead, and from its value back."""

    owner: str
    value: str
    told: str
    ahead: tuple[str, str]
    back: tuple[str, str]


def owners(rng: Random, count: int) -> list[str]:
    """People of the training kind only."""
    found: list[str] = []
    while len(found) < count:
        (name,) = context.people(rng, 1)
        if name not in found and not held_out(f"ctx {name}"):
            found.append(name)
    return found


def possession(rng: Random, count: int) -> list[Fact]:
    names = owners(rng, count)
    goods = context.things(rng, count) if count < 5 else rng.sample(context.OBJECTS, count)
    verb = rng.choice(("has", "has", *context.VERBS))
    base, back = context.VERBS[verb]
    did = "did" if verb in context.PAST else "does"
    return [
        Fact(
            n,
            g,
            f"{n} {verb} {rng.choice(('the', article(g).split()[0]))} {g}",
            (f"what {did} {n} {base}", f"{n} {verb} the {g}."),
            (f"who {verb} the {g}", back.format(n=n, g=g)),
        )
        for n, g in zip(names, goods, strict=True)
    ]


def location(rng: Random, count: int) -> list[Fact]:
    proper = rng.random() < 0.4
    found = owners(rng, count) if proper else rng.sample(context.OBJECTS, count)
    facts = []
    for owner, place in zip(found, rng.sample(context.PLACES, count), strict=True):
        said = owner if proper else f"the {owner}"
        told = f"{said[0].upper()}{said[1:]} is in the {place}"
        ahead = (f"where is {said}", told + ".")
        back = (f"{'who' if proper else 'what'} is in the {place}", f"In the {place} is {said}.")
        facts.append(Fact(owner, place, told, ahead, back))
    return [f for f in facts if proper or not held_out(f"ctx {f.owner} {f.value}")] or location(
        rng, count
    )


def trait(rng: Random, count: int) -> list[Fact]:
    kind = rng.randrange(len(context.TRAITS))
    told, ahead, back, answer_back = context.TRAITS[kind]
    facts = []
    values = rng.sample(context.TRAIT_VALUES[kind], count)
    for n, v in zip(owners(rng, count), values, strict=True):
        first, second, third, fourth = (
            t.format(n=n, v=v) for t in (told, ahead, back, answer_back)
        )
        facts.append(Fact(n, v, first, (second, first + "."), (third, fourth)))
    return facts


def some_facts(rng: Random, low: int, high: int) -> list[Fact]:
    """Facts of one kind; possession, the hardest, most often."""
    make = rng.choice((possession, possession, possession, location, trait))
    return make(rng, rng.randrange(low, high))


def asked(rng: Random, facts: list[Fact]) -> list[Fact]:
    """Half of the facts, in any order."""
    return rng.sample(facts, (len(facts) + 1) // 2)


GAPS = ((" ", "."), (" ", ","), (": ", ","), (" - ", ";"), (", ", "."))


def listing(rng: Random) -> Drill:
    """Pairs and a list of things in a chat; the answer gives every thing its owner."""
    facts = some_facts(rng, 3, 13)
    gap, mark = rng.choice(GAPS)
    text = " ".join(f"{f.owner}{gap}{f.value}{mark}" for f in facts)
    chosen = asked(rng, facts)
    turn = rng.choice(("The other way round:", "Turned round:", "And back:"))
    question = f"{text} {turn} {', '.join(f.value for f in chosen)}"
    answer = ", ".join(f"{f.value}: {f.owner}" for f in chosen) + "."
    return [("user", question), ("assistant", answer)], facts


def told_by(rng: Random, facts: list[Fact]) -> str:
    text = rng.choice((". ", ". ", " and ", ", ")).join(f.told for f in facts) + "."
    return text.lower() if rng.random() < 0.35 else text


def several(rng: Random) -> Drill:
    """Some questions back in one message, answered one after the other."""
    facts = some_facts(rng, 2, 8)
    chosen = asked(rng, facts)
    question = ", ".join(expand(rng, f.back[0]) for f in chosen)
    user = f"{told_by(rng, facts)} {question[0].upper()}{question[1:]}?"
    return [("user", user), ("assistant", " ".join(f.back[1] for f in chosen))], facts


def questions(rng: Random) -> Drill:
    """A chat about two to six facts: mostly questions back, some ahead."""
    facts = some_facts(rng, 2, 7)
    told = told_by(rng, facts)
    document: Document = []
    for fact in asked(rng, facts):
        question, answer = fact.back if rng.random() < 0.75 else fact.ahead
        question = say(rng, expand(rng, question), wrap=rng.random() < 0.3)
        document += [
            ("user", question if document else f"{told} {question}"),
            ("assistant", answer),
        ]
    return document, facts


def drill(rng: Random) -> Drill:
    """One drill of any kind."""
    return rng.choice((listing, several, questions))(rng)
