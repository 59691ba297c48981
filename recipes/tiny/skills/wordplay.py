"""Words and their order: starting letters, synonyms, sentences, the alphabet, sizes of animals."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, article, ask, listed, phrasing_key, say
from recipes.tiny.skills.geography import COUNTRIES
from recipes.tiny.skills.measures import DAYS, ORDINALS
from recipes.tiny.skills.nature import ANIMALS, THINGS
from recipes.tiny.skills.talk import NAMES

SYNONYMS = """happy glad|big large|small little|fast quick|begin start|end finish|smart clever|angry mad|
scared afraid|tired sleepy|rich wealthy|hard difficult|easy simple|quiet silent|strange odd|pretty beautiful|
shut close|sick ill|speak talk|look see|gift present|rock stone|road street|job work|kid child|sad unhappy|
funny amusing|hot warm|cold chilly|brave courageous|rest relax|shout yell|jump leap|house home|ship boat|
large big|glad happy|quick fast|clever smart|afraid scared|ill sick|difficult hard|beautiful pretty|
error mistake|mistake error|buy purchase|help assist|answer reply|choose pick|correct right|forest wood"""
SYNONYM = [pair.split() for pair in SYNONYMS.replace("\n", "").split("|")]
SIZES = """ant bee spider mouse rat squirrel cat fox dog sheep pig lion cow horse rhino elephant""".split()
POOLS = {
    "animal": sorted(row[0] for row in ANIMALS),
    "country": sorted(c.name for c in COUNTRIES if not c.name.startswith("the ")),
    "fruit": sorted(row[0] for row in THINGS if row[1] == "fruit"),
    "name": sorted(NAMES),
    "word": sorted(row[0] for row in THINGS if " " not in row[0]),
}
SCENES = (
    "The {w} is in the garden.",
    "I see the {w} every day.",
    "My friend has {a}.",
)
WITH = {
    "that can fly": ["owl", "eagle", "duck", "bee", "bat"],
    "that can swim": ["duck", "whale", "dolphin", "penguin", "seal"],
    "with four legs": ["dog", "cat", "horse", "cow", "lion"],
    "with two legs": ["chicken", "duck", "owl", "penguin", "ostrich"],
    "with six legs": ["ant", "bee", "fly", "wasp", "beetle"],
    "that live in the sea": ["whale", "dolphin", "shark", "octopus", "seal"],
    "that live on a farm": ["cow", "pig", "chicken", "goat", "horse"],
    "that eat grass": ["cow", "horse", "sheep", "zebra", "rabbit"],
    "without legs": ["snake", "worm", "whale", "shark", "dolphin"],
}


def starting(rng: Random) -> list[Turn]:
    kind = rng.choice(list(POOLS))
    pool = POOLS[kind]
    letter = rng.choice(pool)[0].lower()
    found = [w for w in pool if w[0].lower() == letter]
    n = min(rng.choice((1, 1, 1, 2, 3)), len(found))
    plural = {"country": "countries"}.get(kind, kind + "s")
    typed = letter if rng.random() < 0.5 else letter.upper()
    if n == 1:
        form = f"[name|give me|tell me|say|think of|find] {article(kind)} "
    else:
        form = "[name|give me|tell me|list|find] " + ("two", "three")[n - 2] + f" {plural} "
    form += "[that start with|starting with|beginning with|with]"
    if n == 1:
        form = form.replace("that start with", "that starts with")
    user = say(rng, form + " [the letter |]{=l}", ".", l=typed)
    answer = listed(found[:n])
    return [
        Turn(
            user,
            answer[0].upper() + answer[1:] + ".",
            "starting letters",
            phrasing_key(user),
            found[0],
        )
    ]


def synonym(rng: Random) -> list[Turn]:
    a, b = rng.choice(SYNONYM)
    own = (
        "[what is|give me|tell me|find] [a synonym|another word] [of|for] {x}",
        "[another word|synonym] for {x}",
        "what word means the same as {x}",
        "what is a word like {x}",
    )
    user = say(rng, rng.choice(own), x=a)
    return [Turn(user, f"Another word for {a} is {b}.", "synonyms", phrasing_key(user), b)]


def sentence(rng: Random) -> list[Turn]:
    word = rng.choice(
        [r[0] for r in ANIMALS if " " not in r[0]]
        + POOLS["animal"][:0]
        + """book ball lamp car house tree cup key hat box bird boat robot""".split()
    )
    own = (
        "[use|put] [the word |]{x} in a sentence",
        "[write|make|give me|say] a sentence [with|about|using] [the word |a |]{x}",
        "a sentence with {x}",
        "[can you |]make a short sentence with {x}",
    )
    user = say(rng, rng.choice(own), ".", x=word)
    answers = tuple(s.replace("{w}", word).replace("{a}", article(word)) for s in SCENES)
    return [Turn(user, rng.choice(answers), "sentences", phrasing_key(user), word, answers)]


def alphabet(rng: Random) -> list[Turn]:
    at = rng.randrange(26)
    letter = chr(97 + at)
    kind = rng.randrange(3)
    if kind == 2:
        word = (
            ORDINALS[at]
            if at < 12
            else f"{at + 1}th"
            if at + 1 not in (21, 22, 23)
            else f"{at + 1}{('st', 'nd', 'rd')[at - 20]}"
        )
        user = ask(rng, "the {o} letter [of|in] the [english |]alphabet", o=word)
        return [
            Turn(user, f"The {word} letter is {letter}.", "alphabet", phrasing_key(user), letter)
        ]
    step = 1 if kind == 0 else -1
    if not 0 <= at + step < 26:
        return alphabet(rng)
    where = "after" if step > 0 else "before"
    user = say(
        rng,
        f"[what|which] [letter |][comes|is] {where} [the letter |]{{=l}} [in the alphabet|]",
        l=rng.choice((letter, letter.upper())),
    )
    found = chr(97 + at + step)
    return [
        Turn(
            user.replace(" ?", "?").strip(),
            f"{found} comes {where} {letter}.",
            "alphabet",
            phrasing_key(user),
            found,
        )
    ]


def size(rng: Random) -> list[Turn]:
    a, b = rng.sample(SIZES, 2)
    bigger = rng.random() < 0.6
    big, small = (a, b) if SIZES.index(a) > SIZES.index(b) else (b, a)
    if rng.random() < 0.6:
        word = "[bigger|larger|heavier]" if bigger else "[smaller|lighter]"
        own = (
            f"[which|what] [animal |]is {word}, {{a}} or {{b}}",
            f"[which|what] is {word}: {{a}} or {{b}}",
            f"{{a}} or {{b}}, which is {word}",
        )
        user = say(rng, rng.choice(own), a=article(a), b=article(b))
        answer = (
            f"{article(big)} is bigger than {article(small)}."
            if bigger
            else f"{article(small)} is smaller than {article(big)}."
        )
        return [
            Turn(user, answer.capitalize(), "sizes", phrasing_key(user), big if bigger else small)
        ]
    user = say(
        rng, f"is {{a}} {'bigger' if bigger else 'smaller'} than {{b}}", a=article(a), b=article(b)
    )
    yes = (a == big) == bigger
    word = "bigger" if a == big else "smaller"
    answer = f"{'Yes' if yes else 'No'}, {article(a)} is {word} than {article(b)}."
    return [Turn(user, answer, "sizes", phrasing_key(user), "Yes" if yes else "No")]


def does_it(rng: Random) -> list[Turn]:
    """`Do cats bark?`, `does a snake have legs?`"""
    row = rng.choice([r for r in ANIMALS if r[3]])
    name, legs = row[0], row[2]
    one = article(name)
    if rng.random() < 0.6:
        sound = (
            row[3]
            if rng.random() < 0.5
            else rng.choice(("bark", "meow", "moo", "roar", "quack", "hiss", "buzz", "howl"))
        )
        user = say(rng, "does {x} {s}", x=one, s=sound)
        same = sound == row[3]
        answer = f"Yes, {one} can {sound}." if same else f"No, {one} makes another sound: {row[3]}."
        return [Turn(user, answer, "animals", phrasing_key(user), row[3])]
    n = legs if rng.random() < 0.5 else rng.choice("0246 8".replace(" ", ""))
    if n == "0" or rng.random() < 0.3:
        user = say(rng, "does {x} have legs", x=one)
        answer = f"Yes, {one} has {legs} legs." if legs != "0" else f"No, {one} has no legs."
    else:
        user = say(rng, "does {x} have {n} legs", x=one, n=n)
        has = f"{legs} legs" if legs != "0" else "no legs"
        answer = f"{'Yes' if n == legs else 'No'}, {one} has {has}."
    if name == "seal":
        return does_it(rng)
    return [Turn(user, answer, "animals", phrasing_key(user), answer.split(",")[0])]


def animals_with(rng: Random) -> list[Turn]:
    trait = rng.choice(list(WITH))
    n = rng.choice((1, 2, 3, 3, 4))
    if n == 1:
        one = trait.replace("live", "lives").replace("eat", "eats")
        user = say(rng, f"[name|give me|tell me|which is|what is] an animal {one}", ".")
    else:
        word = rng.choice(
            (str(n), ("two", "three", "four")[n - 2], *(("some", "a few") if n == 3 else ()))
        )
        user = say(rng, f"[name|list|give me|tell me|what are] {word} animals {trait}", ".")
    names = WITH[trait][:n]
    return [
        Turn(
            user,
            listed([names[0].capitalize(), *names[1:]]) + ".",
            "some things",
            phrasing_key(user),
            names[0],
        )
    ]


def week(rng: Random) -> list[Turn]:
    at = rng.randrange(7)
    user = ask(
        rng, "the {o} day of the week", ("which day is the {o} [day |]of the week",), o=ORDINALS[at]
    )
    return [
        Turn(
            user,
            f"The {ORDINALS[at]} day of the week is {DAYS[at]}.",
            "dates",
            phrasing_key(user),
            DAYS[at],
        )
    ]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "starting": (0.8, starting),
    "synonym": (0.6, synonym),
    "sentence": (0.5, sentence),
    "alphabet": (0.6, alphabet),
    "size": (0.6, size),
    "does_it": (0.6, does_it),
    "animals_with": (0.4, animals_with),
    "week": (0.2, week),
}
