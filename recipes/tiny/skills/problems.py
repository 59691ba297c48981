"""Sums in other clothes: two steps, decimals, checks, primes, Roman numerals, prices and ages."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, ask, phrasing_key, say
from recipes.tiny.skills.measures import shown

ROMAN = """I II III IV V VI VII VIII IX X XI XII XIII XIV XV XVI XVII XVIII XIX XX""".split()
GOODS = (
    """pen book apple ball cake lamp hat ticket egg bag cup toy coat shirt banana cookie""".split()
)


def two_steps(rng: Random) -> list[Turn]:
    a, b, c = rng.randrange(1, 31), rng.randrange(1, 13), rng.randrange(1, 13)
    kind = rng.randrange(5)
    if kind == 0:
        own = ("{a} + {b} [x|*|times] {c}", "{a}+{b}*{c}", "{a} plus {b} times {c}")
        first, second, value = f"{b} x {c} = {b * c}", f"{a} + {b * c}", a + b * c
    elif kind == 1:
        own = ("{b} [x|*|times] {c} + {a}", "{b}*{c}+{a}", "{b} times {c} plus {a}")
        first, second, value = f"{b} x {c} = {b * c}", f"{b * c} + {a}", b * c + a
    elif kind == 2:
        own = ("({a} + {b}) [x|*|times] {c}", "({a}+{b})*{c}")
        first, second, value = f"{a} + {b} = {a + b}", f"{a + b} x {c}", (a + b) * c
    elif kind == 3:
        c = rng.randrange(a + b + 1)
        own = ("{a} + {b} - {c}", "{a}+{b}-{c}", "{a} plus {b} minus {c}")
        first, second, value = f"{a} + {b} = {a + b}", f"{a + b} - {c}", a + b - c
    else:
        a += b
        own = ("{a} - {b} + {c}", "{a}-{b}+{c}", "{a} minus {b} plus {c}")
        first, second, value = f"{a} - {b} = {a - b}", f"{a - b} + {c}", a - b + c
    user = ask(rng, rng.choice(own), own, a=a, b=b, c=c)
    return [
        Turn(user, f"{first}, and {second} = {value}.", "two steps", f"two {a} {b} {c}", str(value))
    ]


def decimals(rng: Random) -> list[Turn]:
    """One decimal, or a negative number."""
    if rng.random() < 0.6:
        x, y = rng.randrange(1, 200), rng.randrange(1, 200)
        sign = rng.choice("+-")
        if sign == "-":
            x, y = max(x, y), min(x, y)
        value = shown((x + y if sign == "+" else x - y) / 10)
        a, b = shown(x / 10), shown(y / 10)
        if "." not in a + b:
            return decimals(rng)
    else:
        x, y = -rng.randrange(1, 60), rng.randrange(1, 60)
        sign = rng.choice("+-")
        value = str(x + y if sign == "+" else x - y)
        a, b = str(x), str(y)
    word = "plus" if sign == "+" else "minus"
    user = ask(rng, "[{a} {s} {b}|{a} {s} {b}|{a} {w} {b}|{a}{s}{b}]", a=a, b=b, s=sign, w=word)
    return [Turn(user, f"{a} {sign} {b} = {value}.", "decimals", f"dec {a} {sign} {b}", value)]


def check(rng: Random) -> list[Turn]:
    """`Is 2 + 2 = 5?`"""
    sign = rng.choice("++-x")
    a, b = rng.randrange(1, 60), rng.randrange(1, 60)
    if sign == "x":
        a, b = a % 12 + 1, b % 12 + 1
    if sign == "-":
        a, b = max(a, b), min(a, b)
    value = a + b if sign == "+" else a - b if sign == "-" else a * b
    said = value if rng.random() < 0.5 else value + rng.choice((-10, -2, -1, 1, 2, 10))
    own = (
        "is {a} {s} {b} [=|equal to] {c}",
        "{a} {s} {b} = {c}, [right|is that right|correct|true or false]",
        "does {a} {s} {b} [equal|make] {c}",
        "is it true that {a} {s} {b} [is|=] {c}",
    )
    user = say(rng, rng.choice(own), a=a, b=b, c=said, s=sign)
    answer = f"{a} {sign} {b} = {value}, so {'yes' if said == value else 'no'}."
    return [Turn(user, answer, "check", f"check {a} {sign} {b}", str(value))]


def prime(rng: Random) -> list[Turn]:
    n = rng.randrange(2, 101)
    factor = next((d for d in range(2, 11) if n % d == 0 and d < n), 0)
    user = say(rng, "is {n} [a prime number|prime|a prime]", n=n)
    answer = f"No, {n} = {factor} x {n // factor}." if factor else f"Yes, {n} is a prime number."
    return [Turn(user, answer, "primes", phrasing_key(user), answer.split(",")[0])]


def roman(rng: Random) -> list[Turn]:
    n = rng.choice((*range(1, 21), 50, 100, 500, 1000))
    text = {50: "L", 100: "C", 500: "D", 1000: "M"}.get(n) or ROMAN[n - 1]
    if rng.random() < 0.6:
        user = ask(rng, "{n} [in roman numerals|as a roman numeral|in roman numbers]", n=n)
        answer, fact = f"{n} in Roman numerals is {text}.", text
    else:
        user = say(
            rng, "what [number |]is [the roman numeral |roman |]{=t}[ in roman numerals|]", t=text
        )
        if text in ["I", "C", "D", "M", "V", "X", "L"] and "roman" not in user.lower():
            return roman(rng)
        answer, fact = f"The Roman numeral {text} is {n}.", str(n)
    return [Turn(user, answer, "roman", phrasing_key(user), fact)]


def price(rng: Random) -> list[Turn]:
    good, coin = rng.choice(GOODS), rng.choice(("dollars", "euros"))
    one, n = rng.randrange(2, 13), rng.randrange(2, 13)
    many = good + "s"
    own = (
        "[a|one] {g} costs {p} {c}. [how much|what] do {n} {m} cost",
        "if [a|one] {g} costs {p} {c}, [how much|what] do {n} {m} cost",
        "{m} cost {p} {c} each. [how much|what] do {n} cost",
        "i buy {n} {m} for {p} {c} each. how much do i pay",
        "how much are {n} {m} at {p} {c} each",
    )
    user = say(rng, rng.choice(own), g=good, p=one, c=coin, n=n, m=many)
    answer = f"{n} x {one} = {n * one}, so {n} {many} cost {n * one} {coin}."
    return [Turn(user, answer, "word problems", f"price {n} {one} {good}", str(n * one))]


def mine(rng: Random) -> list[Turn]:
    """Problems told in the first person."""
    a, b = rng.randrange(2, 80), rng.randrange(1, 40)
    kind = rng.randrange(4)
    noun = rng.choice(
        """apples books dollars euros coins cookies eggs cards balls candies marbles""".split()
    )
    if kind == 0:
        own = (
            "i am {a} [years old|]. how old will i be in {b} years",
            "if i am {a} [now|], how old will i be in {b} years",
        )
        answer, value = f"{a} + {b} = {a + b}, so you will be {a + b}.", a + b
    elif kind == 1:
        own = (
            "i have {a} {n} and [get|buy|find|win] {b} more. how many {n} do i have[ now|]",
            "if i have {a} {n} and [you give me|i get|i buy|i add] {b} [more|], how many do i have",
        )
        answer, value = f"{a} + {b} = {a + b}, so you have {a + b} {noun}.", a + b
    elif kind == 2:
        a, b = max(a, b) + 1, min(a, b)
        own = (
            "i have {a} {n} and [lose|give away|sell|spend|use] {b}. how many {n} do i have [left|]",
            "i had {a} {n} and [gave away|lost|sold|used] {b}. how many are left",
            "if i have {a} {n} and [give you|lose|give away] {b}, how many [do i have left|are left]",
        )
        rest = noun if a - b != 1 else noun.removesuffix("s")
        answer, value = f"{a} - {b} = {a - b}, so you have {a - b} {rest}.", a - b
    else:
        b = rng.randrange(2, 11)
        each = rng.randrange(2, 11)
        a = b * each
        own = (
            "[i share|we share|share] {a} {n} [among|between] {b} [friends|people|children]. how many does each get",
            "{b} [friends|people|children] share {a} {n}. how many does each get",
        )
        answer, value = f"{a} / {b} = {each}, so each gets {each} {noun}.", each
    user = say(rng, rng.choice(own), a=a, b=b, n=noun)
    return [Turn(user, answer, "word problems", f"own {kind} {a} {b}", str(value))]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "two_steps": (0.9, two_steps),
    "decimals": (1.4, decimals),
    "check": (0.7, check),
    "prime": (0.5, prime),
    "roman": (0.4, roman),
    "price": (0.5, price),
    "own_problem": (1.0, mine),
}
