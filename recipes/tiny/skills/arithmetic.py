"""Sums as people type them: four operations, comparing, sorting, counting, word problems."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, ask, listed, phrasing_key, say

ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
TOO_BIG = "That is too big for me: I add up to 9999 and multiply up to 99 by 12."
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
SUB = ("{a} - {b}", "{a} - {b}", "{a}-{b}", "{a} minus {b}", "the difference [of|between] {a} and {b}")
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


def _small(*numbers: int) -> bool:
    return all(n <= 12 for n in numbers)


def add(rng: Random) -> list[Turn]:
    a, b = operand(rng), operand(rng)
    x, y = spelled(rng, a, b)
    user = ask(rng, ADD[rng.randrange(len(ADD))], ADD_OWN, a=x, b=y)
    key = "" if _small(a, b) else f"add {min(a, b)} {max(a, b)}"
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
    key = "" if _small(a, b) else f"sub {a} {b}"
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
        a, b = rng.choice(((100, 4), (100, 10), (100, 5), (1000, 10), (100, 20), (100, 2), (50, 25)))
    user = ask(rng, DIV[rng.randrange(len(DIV))], DIV_OWN, a=a, b=b)
    rest = a % b
    answer = f"{a} / {b} = {a // b}" + (f", remainder {rest}." if rest else ".")
    if rng.random() < 0.04:
        user = ask(rng, DIV[rng.randrange(len(DIV))], DIV_OWN, a=a, b=0)
        return [Turn(user, "Nothing can be divided by 0.", "divide", phrasing_key(user))]
    return [Turn(user, answer, "divide", phrasing_key(user), fact=str(a // b))]


def three(rng: Random) -> list[Turn]:
    a, b, c = (rng.randrange(rng.choice((10, 51))) for _ in range(3))
    own = ("{a} + {b} + {c}[ =|]", "{a}+{b}+{c}", "add [up |]{a}, {b} and {c}", "{a} plus {b} plus {c}")
    user = ask(rng, "[{a} + {b} + {c}|the sum of {a}, {b} and {c}]", own, a=a, b=b, c=c)
    answer = f"{a} + {b} = {a + b}, and {a + b} + {c} = {a + b + c}."
    return [Turn(user, answer, "three numbers", f"three {a} {b} {c}", fact=str(a + b + c))]


def parts(rng: Random) -> list[Turn]:
    """Double, half, square, percent, even or odd, next and previous number."""
    n = rng.randrange(rng.choice((13, 101)))
    kind = rng.randrange(8)
    if kind == 0:
        user = ask(rng, "[double {n}|twice {n}|the double of {n}|two times {n}]", ("double {n}",), n=n)
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
        share = rng.choice((10, 20, 25, 50, 100))
        n = rng.randrange(1, 21) * rng.choice((20, 100))
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
        user = say(rng, "[what|which number|what number] [comes|is] [right |] " + where + " {n}", n=n)
        answer, fact = f"{n + step} comes {where} {n}.", n + step
    else:
        n = rng.randrange(0, 13) ** 2
        user = ask(rng, "[the square root of {n}|the root of {n}|sqrt {n}]", n=n)
        answer, fact = f"The square root of {n} is {int(n**0.5)}.", int(n**0.5)
    return [Turn(user, answer, "number parts", f"parts {kind} {n}" if n > 12 else "", str(fact))]


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
    return [Turn(user, answer, "compare", "" if _small(a, b) else f"cmp {small} {big}", str(big))]


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
    word = "[largest|biggest|highest|greatest|maximum|max]" if top else "[smallest|lowest|minimum|min]"
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
        user = say(rng, "[count|can you count] [back|backwards|down] from {n} to {s}", "", n=top, s=start)
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
            frames = (f"[subtract|now subtract|take away] {{n}}[ from {that}|]", "[minus|and minus] {n}")
            answer, value = f"{value} - {n} = {value - n}.", value - n
        else:
            frames = (f"[double|now double] {that}", f"[times|multiply {that} by] [2|two]")
            answer, value = f"{value} x 2 = {2 * value}.", 2 * value
        user = say(rng, rng.choice(frames), n=n)
        turns.append(Turn(user, answer, "sum follow-up", f"follow {answer}", fact=str(value)))
    return turns


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "add": (5.0, add),
    "subtract": (5.0, subtract),
    "times": (3.0, times),
    "divide": (1.2, divide),
    "three": (1.0, three),
    "parts": (1.5, parts),
    "compare": (1.8, compare),
    "sort": (2.0, sort),
    "extremes": (0.8, extremes),
    "count_to": (0.5, count_to),
    "too_big": (0.5, too_big),
    "follow_up": (1.0, follow_up),
}
