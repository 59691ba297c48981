"""Lists and letters: reverse, upper case, repeat, first and last, copy, spell, count letters."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

import re
from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import FACTS, Turn, listed, say
from recipes.tiny.skills.nature import ANIMALS, COLOURS, THINGS
from recipes.tiny.skills.talk import NAMES, new_name

WORDS = sorted(
    {row[0] for row in THINGS + ANIMALS if " " not in row[0]}
    | {row[0] for row in COLOURS}
    | set(
        """hello world happy little summer winter garden paper window silver morning people letter
python summer monday friday water simple number yellow pretty tiger banana coffee holiday
mississippi strawberry blueberry google engine token model prompt cache adapter level
radar noon racecar kayak good book moon food school week year house home time music pencil
bottle cheese flower dinner lunch table chair money family mother father sister brother""".split()
    )
)


def _wide() -> list[str]:
    """Every plain word of the fact files, so that the letters of many tokens are learnt."""
    found: set[str] = set()
    for path in sorted(FACTS.glob("*.txt")):
        found |= set(re.findall(r"\b[a-z]{2,11}\b", path.read_text(encoding="utf-8").lower()))
    return sorted(found)


WIDE = _wide()


def word(rng: Random) -> str:
    """A common word, any word, or an invented one so that copying is learnt letter by letter."""
    roll = rng.random()
    if roll < 0.35:
        return rng.choice(WORDS)
    return rng.choice(WIDE) if roll < 0.75 else new_name(rng).lower()


def phrase(rng: Random) -> str:
    """Some plain words in a row, as people quote them."""
    starts = (
        "hello|good|i like|the|we see the|my|hello|this is|i am|you are|nice|good morning|happy|one"
    )
    start = rng.choice(starts.split("|"))
    return f"{start} {' '.join(word(rng) for _ in range(rng.randrange(1, 4)))}"


def items(rng: Random, low: int = 2, high: int = 6) -> list[str]:
    count = rng.randrange(low, high + 1)
    kind = rng.random()
    if kind < 0.2:
        return rng.sample(NAMES, count)
    if kind < 0.35:
        return [str(n) for n in rng.sample(range(100), count)]
    found: list[str] = []
    while len(found) < count:
        w = word(rng)
        if w not in found:
            found.append(w)
    return found


def _shown(rng: Random, values: list[str]) -> str:
    roll = rng.random()
    if roll < 0.55:
        return ", ".join(values)
    if roll < 0.75:
        return " ".join(values)
    return listed(values) if roll < 0.9 else ",".join(values)


def _key(values: list[str]) -> str:
    return "list " + " ".join(sorted(v.lower() for v in values))


THESE = "[|these words|the words|the list|this list|the following words|these|the following]"


def reverse_list(rng: Random) -> list[Turn]:
    values = items(rng)
    own = (
        "reverse " + THESE + "[:|] {=x}",
        "[say|write|list|put|give me] {=x} [backwards|in reverse|in reverse order|the other way round]",
        "[turn around|flip|invert] [the list|the order of|] {=x}",
        "[can you |please ]reverse {=x}",
        "{=x} [reversed|in reverse order]",
        "what is {=x} in reverse order",
    )
    user = say(rng, rng.choice(own), ".", x=_shown(rng, values))
    answer = ", ".join(reversed(values))
    return [Turn(user, answer, "lists", _key(values), fact=answer)]


QUOTES = ("'{=x}'", '"{=x}"', "{=x}", "{=x}", "{=x}")


def letters(rng: Random) -> list[Turn]:
    """Reverse, spell, upper or lower case, repeat, first or last letter of one word."""
    w = word(rng)
    if len(w) > 10:
        return letters(rng)
    q = rng.choice(QUOTES)
    kind = rng.randrange(7)
    if kind == 0:
        own = (
            "reverse [the word |the letters of |]" + q,
            "[spell|write|say] [the word |]" + q + " backwards",
            "[what is|what's] [the word |]" + q + " [backwards|reversed|in reverse]",
            q + " [backwards|reversed]",
        )
        answer = "-".join(w) + f" backwards is {w[::-1]}."
        fact = w[::-1]
    elif kind == 1:
        own = (
            "[spell|can you spell|please spell|how do you spell|how do i spell|how is spelled] [the word |]"
            + q,
            "spell out " + q,
            "what are the letters of " + q,
            "spelling of " + q,
        )
        answer = fact = "-".join(w)
    elif kind == 2:
        text = rng.choice((w, " ".join(items(rng, 1, 3)), phrase(rng)))
        up = rng.random() < 0.7
        case = (
            "[upper case|uppercase|capital letters|capitals|all caps]"
            if up
            else "[lower case|lowercase|small letters]"
        )
        verb = "[uppercase|capitalise|capitalize|upper case]" if up else "[lowercase]"
        own = (
            f"[write|put|say|convert|turn|change] {q} [in|to|into|in] {case}",
            f"{verb} [the word |]{q}",
            f"{q} in {case}",
            f"make {q} {case}",
        )
        w = text if up else text.upper()
        answer = fact = text.upper() if up else text.lower()
    elif kind == 3:
        n = rng.randrange(2, 6)
        times = ("twice", "three times", "four times", "five times")[n - 2]
        own = (
            f"[repeat|say|write|print] [the word |]{q} {rng.choice((times, str(n) + ' times'))}",
            f"repeat {q} {n} times",
        )
        if n == 2:
            own = (f"[repeat|say|write] [the word |]{q} twice",)
        answer = fact = " ".join([w] * n)
    elif kind in (4, 5):
        return end_letter(rng, w, q, kind == 4)
    else:
        return palindrome(rng)
    user = say(rng, rng.choice(own), ".", x=w)
    return [Turn(user, answer, "letters", f"word {kind} {w.lower()}", fact=fact)]


def end_letter(rng: Random, w: str, q: str, first: bool) -> list[Turn]:
    """First or last letter of a word; `q` is how the word stands in the question."""
    end = "first" if first else "last"
    does = "[start|begin] with" if first else "end with"
    own = (
        f"[what is|what's|give me|tell me|which is] the {end} letter [of|in] [the word |]{q}",
        f"{end} letter of {q}",
        f"[which|what] letter does {q} {does}",
    )
    letter = w[0] if first else w[-1]
    user = say(rng, rng.choice(own), x=w)
    key = f"word {4 if first else 5} {w}"
    return [Turn(user, f"The {end} letter of {w} is {letter}.", "letters", key, fact=letter)]


PALINDROMES = """level radar noon racecar kayak madam civic refer rotor stats anna otto""".split()


def palindrome(rng: Random) -> list[Turn]:
    roll = rng.random()
    w = word(rng)
    if roll < 0.25:
        w = rng.choice(PALINDROMES)
    elif roll < 0.55:
        half = new_name(rng).lower()[: rng.randrange(2, 5)]
        w = half + half[::-1][rng.randrange(2) :]
    if len(w) > 8:
        return palindrome(rng)
    user = say(rng, "is [the word |]{=x} [a palindrome|the same backwards]", x=w)
    same = w == w[::-1]
    answer = f"{'-'.join(w)} backwards is {w[::-1]}, so {'yes' if same else 'no'}."
    return [Turn(user, answer, "letters", f"word 6 {w}", fact="yes" if same else "no")]


def count_letter(rng: Random) -> list[Turn]:
    """Letters are written out with a running count, so that counting is a local step."""
    w = word(rng)
    if len(w) > 12:
        return count_letter(rng)
    letter = rng.choice(w) if rng.random() < 0.85 else rng.choice("abcdeilmnorst")
    typed = rng.choice((f"{letter}'s", letter, f"{letter}s", f'"{letter}"', f"letters {letter}"))
    own = (
        "how many {=l} [are|are there] in [the word |]{=x}",
        "how many {=l} [does|has] [the word |]{=x} [have|]",
        "[count|count the] {=l} in [the word |]{=x}",
        "how [often|many times] [does|is] {=l} [occur |appear |]in {=x}",
        "number of {=l} in {=x}",
    )
    user = say(rng, rng.choice(own), l=typed, x=rng.choice((w, w, f"'{w}'", f'"{w}"')))
    n, shown = 0, []
    for c in w:
        n += c == letter
        shown.append(f"{c}({n})" if c == letter else c)
    answer = f"{'-'.join(shown)}: {n}."
    return [Turn(user, answer, "count letters", f"count {letter} {w}", fact=str(n))]


def length(rng: Random) -> list[Turn]:
    w = word(rng)
    if len(w) > 12:
        return length(rng)
    own = (
        "how many letters [are in|does|has] [the word |]{=x} [have|]",
        "how many letters are there in {=x}",
        "[what is|tell me] the length of [the word |]{=x}",
        "how long is the word {=x}",
        "count the letters [in|of] {=x}",
        "[count|number of] [characters|letters] in {=x}",
    )
    user = say(rng, rng.choice(own), x=rng.choice((w, w, f"'{w}'", f'"{w}"')))
    shown = "-".join(f"{c}{i + 1}" for i, c in enumerate(w))
    answer = f"{shown}: {len(w)} letters."
    return [Turn(user, answer, "count letters", f"len {w}", fact=str(len(w)))]


def vowels(rng: Random) -> list[Turn]:
    w = word(rng)
    if len(w) > 10:
        return vowels(rng)
    user = say(rng, "how many vowels [are in|are there in|does|has] [the word |]{=x}[ have|]", x=w)
    n, shown = 0, []
    for c in w:
        n += c in "aeiou"
        shown.append(f"{c}({n})" if c in "aeiou" else c)
    return [Turn(user, f"{'-'.join(shown)}: {n}.", "count letters", f"vowels {w}", fact=str(n))]


def pick(rng: Random) -> list[Turn]:
    """First, last or n-th item of a list, and how many there are."""
    values = items(rng, 2)
    x = _shown(rng, values)
    if " " in x and "," not in x and "and" not in x:
        x = ", ".join(values)
    at = rng.choice((0, -1, rng.randrange(len(values))))
    word_at = "last" if at == -1 else ["first", "second", "third", "fourth", "fifth", "sixth"][at]
    kind = rng.random()
    if kind < 0.75:
        own = (
            "[what is|which is|what's|tell me|give me|say] the {n} [word|item|one|element|thing] [of|in|:] {=x}",
            "[which|what] [word|item|one] [is|comes] {n}: {=x}",
            "{n} [word|item] of {=x}",
            "in the list {=x}[,|] [what|which] [one |item |]is [the |]{n}",
        )
        user = say(rng, rng.choice(own), n=word_at, x=x)
        answer = fact = values[at]
        return [Turn(user, f"The {word_at} is {answer}.", "lists", _key(values), fact=fact)]
    own = (
        "how many [words|items|things] are [in the list |in |there: |here: |]{=x}",
        "count the [words|items]: {=x}",
    )
    user = say(rng, rng.choice(own), x=x)
    shown = ", ".join(f"{v} {i + 1}" for i, v in enumerate(values))
    return [Turn(user, f"{shown}: {len(values)}.", "lists", _key(values), fact=str(len(values)))]


def alphabetical(rng: Random) -> list[Turn]:
    pool = NAMES if rng.random() < 0.3 else WORDS
    values = rng.sample(pool, rng.randrange(2, 6))
    own = (
        "[sort|order|arrange|put] "
        + THESE
        + "[:|] {=x} [alphabetically|by alphabet|in alphabetical order|from a to z]",
        "[sort|order|arrange] {=x} alphabetically",
        "[alphabetical order|alphabetise|alphabetize][:|] {=x}",
        "[sort|order] " + THESE + "[:|] {=x}",
    )
    user = say(rng, rng.choice(own), ".", x=_shown(rng, values))
    answer = ", ".join(sorted(values, key=str.lower))
    return [Turn(user, answer, "lists", _key(values), fact=answer)]


def copy(rng: Random) -> list[Turn]:
    """Say exactly what is asked for."""
    text = " ".join(items(rng, 1, 5)) if rng.random() < 0.5 else phrase(rng)
    own = (
        "[say|repeat|write|print|copy|echo|output|type] [this:|after me:|exactly this:|:|the words|] '{=x}'",
        '[say|repeat|write|print|copy|echo|output] [this:|after me:|exactly this:|] "{=x}"',
        "[repeat|repeat after me|say this|copy this|echo|say after me|write this down|say the following]: {=x}",
        "say {=x}",
        "[can you |please ]say {=x}",
    )
    user = say(rng, rng.choice(own), "", wrap=False, x=text)
    return [Turn(user, text, "lists", _key(text.split()), fact=text)]


def join(rng: Random) -> list[Turn]:
    """Items with `and`, with commas, or numbered lines."""
    values = items(rng, 2, 5)
    kind = rng.randrange(2)
    if kind == 0:
        own = ("[join|connect|link] {=x} with [and|the word and]",)
        answer = " and ".join(values)
    else:
        own = (
            "[write|put|show|make] {=x} [as a list|as a numbered list|in a numbered list]",
            "[number|make a list of|make a numbered list of|make a shopping list with|list] {=x}",
        )
        answer = "\n".join(f"{i + 1}. {v}" for i, v in enumerate(values))
    user = say(rng, rng.choice(own), ".", x=", ".join(values))
    return [Turn(user, answer, "lists", _key(values), fact=values[0])]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "reverse_list": (1.2, reverse_list),
    "letters": (7.5, letters),
    "count_letter": (1.6, count_letter),
    "length": (1.2, length),
    "vowels": (0.5, vowels),
    "pick": (1.2, pick),
    "alphabetical": (1.6, alphabetical),
    "copy": (0.8, copy),
    "join": (0.5, join),
}
