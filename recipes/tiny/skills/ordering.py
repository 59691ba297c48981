"""Comparing, sorting and counting numbers, sums too large, and sums that go on from a result."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, ask, listed, phrasing_key, say
from recipes.tiny.skills.arithmetic import (
    ADD,
    ADD_OWN,
    MUL,
    MUL_OWN,
    add,
    all_small,
    operand,
    subtract,
    times,
)

TOO_BIG = "That is too big for me: I add up to 9999 and multiply up to 99 by 12."
BIGGER = (
    "[which|what] [number |]is [bigger|larger|greater|more], {a} or {b}",
    "[which|what] is the [bigger|larger|greater] [number|one], {a} or {b}",
    "what is [bigger|larger|greater|more]: {a} or {b}",
    "{a} or {b}, [which|what] is [bigger|larger|greater]",
    "[compare|can you compare] {a} and {b}",
    "[which|what] is the [bigger|larger] of {a} and {b}",
)
SMALLER = (
    "[which|what] [number |]is [smaller|less|lower], {a} or {b}",
    "[which|what] is the smaller [number|one], {a} or {b}",
    "what is [smaller|less]: {a} or {b}",
    "{a} or {b}, [which|what] is [smaller|less]",
    "[which|what] is the smaller of {a} and {b}",
)
IS_MORE = "is {a} [bigger|larger|more|greater|higher] than {b}"
IS_LESS = "is {a} [smaller|less|lower] than {b}"


def compare(rng: Random) -> list[Turn]:
    size = rng.choice((13, 100, 1000))
    a, b = rng.randrange(size), rng.randrange(size)
    if rng.random() < 0.2:
        b = max(0, a + rng.randrange(-3, 4))
    big, small = max(a, b), min(a, b)
    roll = rng.random()
    if roll < 0.4:
        user = say(rng, rng.choice(BIGGER), a=a, b=b)
        answer = f"{big} is bigger than {small}."
    elif roll < 0.6:
        user = say(rng, rng.choice(SMALLER), a=a, b=b)
        answer = f"{small} is smaller than {big}."
    else:
        more = roll < 0.85
        user = say(rng, IS_MORE if more else IS_LESS, a=a, b=b)
        yes = a > b if more else a < b
        word = "bigger" if a > b else "smaller"
        answer = f"{'Yes' if yes else 'No'}, {a} is {word} than {b}."
    if a == b:
        answer = f"{a} and {b} are equal."
    return [
        Turn(user, answer, "compare", "" if all_small(a, b) else f"cmp {small} {big}", str(big))
    ]


def _number_list(rng: Random, low: int = 2) -> list[int]:
    top = rng.choice((10, 21, 100, 100, 1000))
    return rng.sample(range(top), rng.randrange(low, 6))


def _typed_list(rng: Random, items: list[str]) -> str:
    roll = rng.random()
    if roll < 0.45:
        return ", ".join(items)
    if roll < 0.65:
        return " ".join(items)
    if roll < 0.8:
        return listed(items)
    return ",".join(items)


SORT_UP = (
    "[sort|order|put in order|arrange|sort these numbers:|sort the numbers|please sort] {x}",
    "[sort|order|arrange|put] {x} [from small to large|from smallest to largest|in order|"
    "in ascending order|ascending|from low to high|in increasing order]",
    "[sort|order|arrange] [these|the|these numbers|the numbers|this list][:|] {x}",
    "what is {x} [sorted|in order]",
    "{x} sorted",
)
SORT_DOWN = (
    "[sort|order|arrange|put] {x} [from large to small|from largest to smallest|"
    "in descending order|descending|from high to low|in decreasing order|in reverse order]",
    "[sort|order] [these|the numbers|these numbers] [descending|from largest to smallest]: {x}",
)


def sort(rng: Random) -> list[Turn]:
    numbers = _number_list(rng)
    down = rng.random() < 0.25
    shown = _typed_list(rng, [str(n) for n in numbers])
    user = say(rng, rng.choice(SORT_DOWN if down else SORT_UP), mark=".", x=shown)
    answer = ", ".join(str(n) for n in sorted(numbers, reverse=down)) + "."
    return [Turn(user, answer, "sort", f"sort {sorted(numbers)}", fact=answer[:-1])]


def extremes(rng: Random) -> list[Turn]:
    numbers = _number_list(rng, 3)
    top = rng.random() < 0.6
    shown = _typed_list(rng, [str(n) for n in numbers])
    word = (
        "[largest|biggest|highest|greatest|maximum|max]" if top else "[smallest|lowest|minimum|min]"
    )
    own = (
        f"[which|what] [number |]is [the |]{word}[ number|]: {{x}}",
        f"[find|tell me|give me] the {word} [number |][of|in|among|:] {{x}}",
        f"what is the {word} [number |][of|in|among|out of] {{x}}",
    )
    user = say(rng, rng.choice(own), x=shown)
    found = max(numbers) if top else min(numbers)
    answer = f"The {'largest' if top else 'smallest'} is {found}."
    return [Turn(user, answer, "extremes", f"ext {sorted(numbers)}", fact=str(found))]


def count_to(rng: Random) -> list[Turn]:
    start, n = 1, rng.randrange(3, 21)
    if rng.random() < 0.35:
        start = rng.randrange(0, 60)
        n = start + rng.randrange(2, 12)
    if rng.random() < 0.3:
        top = min(n, start + 12)
        user = say(
            rng, "[count|can you count] [back|backwards|down] from {n} to {s}", "", n=top, s=start
        )
        numbers = list(range(top, start - 1, -1))
    elif start == 1:
        user = say(rng, "[count|can you count|please count|count up] [from 1 |]to {n}", ".", n=n)
        numbers = list(range(1, n + 1))
    else:
        user = say(rng, "[count|can you count] from {s} to {n}", ".", s=start, n=n)
        numbers = list(range(start, n + 1))
    answer = ", ".join(str(i) for i in numbers) + "."
    return [Turn(user, answer, "count to", phrasing_key(user), fact=answer[:-1])]


def too_big(rng: Random) -> list[Turn]:
    a, b = rng.randrange(10**4, 10 ** rng.randrange(5, 9)), operand(rng)
    if rng.random() < 0.5:
        frame, own = rng.choice(ADD), ADD_OWN
    else:
        frame, own = rng.choice(MUL), MUL_OWN
        a = rng.randrange(100, 10000) if rng.random() < 0.7 else a
        b = rng.randrange(13, 1000)
    if rng.random() < 0.5:
        a, b = b, a
    user = ask(rng, frame, own, a=a, b=b)
    return [Turn(user, TOO_BIG, "too big", f"big {a} {b}")]


def follow_up(rng: Random) -> list[Turn]:
    """A sum, then one or two steps on from its result."""
    turns = rng.choice((add, subtract, times))(rng)
    value = int(turns[0].fact)
    for _ in range(rng.randrange(1, 3)):
        if not 0 <= value < 1000:
            break
        n, kind = rng.randrange(1, 60), rng.randrange(3)
        that = "[that|it|the result|this]"
        if kind == 0:
            frames = (f"[add|now add|and add] {{n}}[ to {that}|]", "[plus|and plus|now plus] {n}")
            answer, value = f"{value} + {n} = {value + n}.", value + n
        elif kind == 1:
            n = rng.randrange(value + 1)
            frames = (
                f"[subtract|now subtract|take away] {{n}}[ from {that}|]",
                "[minus|and minus] {n}",
            )
            answer, value = f"{value} - {n} = {value - n}.", value - n
        else:
            frames = (f"[double|now double] {that}", f"[times|multiply {that} by] [2|two]")
            answer, value = f"{value} x 2 = {2 * value}.", 2 * value
        user = say(rng, rng.choice(frames), n=n)
        turns.append(Turn(user, answer, "sum follow-up", f"follow {answer}", fact=str(value)))
    return turns


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "compare": (1.8, compare),
    "sort": (3.4, sort),
    "extremes": (0.8, extremes),
    "count_to": (0.5, count_to),
    "too_big": (0.5, too_big),
    "follow_up": (1.0, follow_up),
}
