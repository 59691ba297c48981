"""Sums as people type them: the four operations and simple parts of numbers."""
# ruff: noqa: SIM905 (word lists read best as text)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, ask, phrasing_key, say

ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
HOW_MUCH = "[how much is|what is|calculate|compute|work out|what's|solve|what does|do|count] "


def words_of(number: int) -> str:
    """`42` -> `forty-two`, up to a hundred."""
    if number < 20:
        return ONES[number]
    if number == 100:
        return "a hundred"
    tens, ones = TENS[number // 10 - 2], number % 10
    return tens if ones == 0 else f"{tens}-{ONES[ones]}"


def spelled(rng: Random, *numbers: int) -> list[str]:
    """The numbers as digits, sometimes as words."""
    if rng.random() < 0.07 and all(0 <= n <= 100 for n in numbers):
        return [words_of(n) for n in numbers]
    return [str(n) for n in numbers]


def operand(rng: Random) -> int:
    """A number up to 9999 with balanced digit counts; most have at most three digits."""
    roll = rng.random()
    if roll < 0.22:
        return rng.randrange(13)
    if roll < 0.5:
        return rng.randrange(100)
    if roll < 0.93:
        return rng.randrange(100, 1000)
    return rng.randrange(1000, 10000)


ADD = (
    "{a} + {b}",
    "{a} + {b}",
    "{a}+{b}",
    "{a} plus {b}",
    "the sum of {a} and {b}",
    "{a} [and|added to] {b} [together|]",
)
ADD_OWN = (
    "{a} + {b} =[ ?|]",
    "{a}+{b}=[?|]",
    "{a} + {b}",
    "{a}+{b}",
    "add {a} [and|to|plus|with] {b}",
    HOW_MUCH + "{a} + {b}",
    HOW_MUCH + "{a} plus {b}",
    "how much are {a} and {b} [together|]",
    "[what do i get|what do you get|what happens|what is the result] [if|when] [i|you|we] add {a} "
    "[and|to] {b}",
    "[what is|what's|tell me|find|give me] the [sum|total] of {a} and {b}",
    "[if i add|adding|i add|when i add] {a} and {b}, [what is it|what do i get|how much is that]",
    "{a} and {b} [makes|make|is|equals|gives] [what|how much|]",
    "can you [add|sum|add up|add together] {a} and {b}",
)
SUB = (
    "{a} - {b}",
    "{a} - {b}",
    "{a}-{b}",
    "{a} minus {b}",
    "the difference [of|between] {a} and {b}",
)
SUB_OWN = (
    "{a} - {b} =[ ?|]",
    "{a}-{b}=[?|]",
    "{a} - {b}",
    "{a}-{b}",
    "subtract {b} from {a}",
    "take [away |]{b} [away |]from {a}",
    HOW_MUCH + "{a} - {b}",
    HOW_MUCH + "{a} minus {b}",
    HOW_MUCH + "{a} less {b}",
    "[what do i get|what is left|how much is left|what remains] [if|when] [i|you] [take|subtract] "
    "{b} [away |]from {a}",
    "{a} take away {b}",
    "how much is left of {a} [after taking away|without|minus] {b}",
)
MUL = ("{a} [x|*|times] {b}", "{a}[x|*]{b}", "the product of {a} and {b}", "{a} multiplied by {b}")
MUL_OWN = (
    "{a} [x|*|times] {b} =[ ?|]",
    "{a} [x|*|times] {b}",
    "{a}[*|x]{b}[=|=?|]",
    "multiply {a} [by|and|with|times] {b}",
    HOW_MUCH + "{a} [x|*|times|multiplied by] {b}",
    "[what do i get|what do you get] [if|when] [i|you] multiply {a} [by|and] {b}",
    "what are {a} times {b}",
)
DIV = ("{a} [/|:|divided by|over] {b}", "{a}/{b}", "{a} by {b}")
DIV_OWN = (
    "{a} [/|:|divided by] {b} =[ ?|]",
    "{a} [/|divided by] {b}",
    "divide {a} by {b}",
    HOW_MUCH + "{a} [/|divided by|:] {b}",
    "how many times does {b} [go|fit] in[to|] {a}",
    "[what do i get|what do you get] [if|when] [i|you] divide {a} by {b}",
    "share {a} [among|between|by] {b}",
)


def all_small(*numbers: int) -> bool:
    return all(n <= 12 for n in numbers)


def add(rng: Random) -> list[Turn]:
    a, b = operand(rng), operand(rng)
    x, y = spelled(rng, a, b)
    user = ask(rng, ADD[rng.randrange(len(ADD))], ADD_OWN, a=x, b=y)
    key = "" if all_small(a, b) else f"add {min(a, b)} {max(a, b)}"
    return [Turn(user, f"{a} + {b} = {a + b}.", "add", key, fact=str(a + b))]


def subtract(rng: Random) -> list[Turn]:
    a, b = operand(rng), operand(rng)
    if a < b and rng.random() < 0.85:
        a, b = b, a
    x, y = spelled(rng, a, b)
    frame = SUB[rng.randrange(len(SUB))]
    user = ask(rng, frame, SUB_OWN, a=x, b=y)
    if "difference" in user.lower() and a < b:
        return subtract(rng)
    key = "" if all_small(a, b) else f"sub {a} {b}"
    return [Turn(user, f"{a} - {b} = {a - b}.", "subtract", key, fact=str(a - b))]


def times(rng: Random) -> list[Turn]:
    a, b = rng.randrange(13), rng.randrange(13)
    roll = rng.random()
    skill = "times"
    if roll > 0.65:
        a, skill = rng.randrange(100), "times to 99"
    if roll > 0.92:
        a, b = rng.choice((10, 100, 1000, 20, 50, 25)), rng.randrange(1, 11)
    if rng.random() < 0.5:
        a, b = b, a
    x, y = spelled(rng, a, b)
    user = ask(rng, MUL[rng.randrange(len(MUL))], MUL_OWN, a=x, b=y)
    return [Turn(user, f"{a} x {b} = {a * b}.", skill, phrasing_key(user), fact=str(a * b))]


def divide(rng: Random) -> list[Turn]:
    b = rng.randrange(1, 13)
    a = b * rng.randrange(13)
    if rng.random() < 0.25:
        a = rng.randrange(1, 100)
    if rng.random() < 0.1:
        a, b = rng.choice(
            ((100, 4), (100, 10), (100, 5), (1000, 10), (100, 20), (100, 2), (50, 25))
        )
    user = ask(rng, DIV[rng.randrange(len(DIV))], DIV_OWN, a=a, b=b)
    rest = a % b
    answer = f"{a} / {b} = {a // b}" + (f", remainder {rest}." if rest else ".")
    if rng.random() < 0.04:
        user = ask(rng, DIV[rng.randrange(len(DIV))], DIV_OWN, a=a, b=0)
        return [Turn(user, "Nothing can be divided by 0.", "divide", phrasing_key(user))]
    return [Turn(user, answer, "divide", phrasing_key(user), fact=str(a // b))]


def three(rng: Random) -> list[Turn]:
    a, b, c = (rng.randrange(rng.choice((10, 51))) for _ in range(3))
    own = (
        "{a} + {b} + {c}[ =|]",
        "{a}+{b}+{c}",
        "add [up |]{a}, {b} and {c}",
        "{a} plus {b} plus {c}",
    )
    user = ask(rng, "[{a} + {b} + {c}|the sum of {a}, {b} and {c}]", own, a=a, b=b, c=c)
    answer = f"{a} + {b} = {a + b}, and {a + b} + {c} = {a + b + c}."
    return [Turn(user, answer, "three numbers", f"three {a} {b} {c}", fact=str(a + b + c))]


def parts(rng: Random) -> list[Turn]:
    """Double, half, square, percent, even or odd, next and previous number."""
    n = rng.randrange(rng.choice((13, 101)))
    kind = rng.randrange(8)
    if kind == 0:
        user = ask(
            rng, "[double {n}|twice {n}|the double of {n}|two times {n}]", ("double {n}",), n=n
        )
        answer, fact = f"Twice {n} is {2 * n}.", 2 * n
    elif kind == 1:
        n *= 2
        user = ask(rng, "[half of {n}|half {n}|the half of {n}|{n} halved]", ("halve {n}",), n=n)
        answer, fact = f"Half of {n} is {n // 2}.", n // 2
    elif kind == 2:
        n %= 21
        user = ask(rng, "[{n} squared|the square of {n}|{n}^2]", ("square {n}",), n=n)
        answer, fact = f"{n} squared is {n * n}.", n * n
    elif kind == 3:
        share = rng.choice((5, 10, 10, 15, 20, 20, 25, 25, 30, 40, 50, 50, 60, 75, 80, 100))
        n = rng.randrange(1, 21) * 20 if rng.random() < 0.7 else rng.randrange(1, 11) * 100
        user = ask(rng, "{p}[%| percent| per cent] of {n}", p=share, n=n)
        answer, fact = f"{share}% of {n} is {n * share // 100}.", n * share // 100
    elif kind == 4:
        n = rng.randrange(1000)
        own = ("is {n} [even|odd|even or odd|an even number|an odd number]",)
        user = say(rng, own[0], n=n)
        answer, fact = f"{n} is {'odd' if n % 2 else 'even'}.", n
    elif kind in (5, 6):
        n, step = rng.randrange(1, 1000), 1 if kind == 5 else -1
        where = "after" if step > 0 else "before"
        user = say(
            rng, "[what|which number|what number] [comes|is] [right |] " + where + " {n}", n=n
        )
        answer, fact = f"{n + step} comes {where} {n}.", n + step
    else:
        n = rng.randrange(0, 13) ** 2
        user = ask(rng, "[the square root of {n}|the root of {n}|sqrt {n}]", n=n)
        answer, fact = f"The square root of {n} is {int(n**0.5)}.", int(n**0.5)
    key = f"parts {kind} {n}" if n > 12 else ""
    if kind in (2, 3, 7):
        key = phrasing_key(user)
    return [Turn(user, answer, "number parts", key, str(fact))]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "add": (5.0, add),
    "subtract": (5.0, subtract),
    "times": (3.0, times),
    "divide": (1.2, divide),
    "three": (1.0, three),
    "parts": (1.5, parts),
}
