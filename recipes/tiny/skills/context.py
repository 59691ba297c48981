"""Questions about what was said before: who has what, where things are, names, word problems."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, article, held_out, listed, say
from recipes.tiny.skills.lists import new_name
from recipes.tiny.skills.nature import ANIMALS, THINGS
from recipes.tiny.skills.talk import NAMES, introduce, recall_name

COLOURS = (
    """red blue green yellow black white brown pink grey purple orange golden silver""".split()
)
OBJECTS = """key ball book hat cup pen bag box coat lamp ring bike kite map coin apple cake umbrella
phone chair cat dog bird fish shoe letter flower watch guitar drum candle rope spoon
bottle ticket toy car boat sock scarf plate banana robot camera""".split()
PLACES = """kitchen garden bedroom garage attic cellar bathroom hall office shed school park shop
library station box drawer bag fridge car basket cupboard""".split()
FOODS = [
    "pizza",
    "rice",
    "apples",
    "soup",
    "bread",
    "cheese",
    "cake",
    "fish",
    "pasta",
    "chocolate",
    "bananas",
    "salad",
    "ice cream",
    "eggs",
]
JOBS = (
    """baker teacher doctor pilot farmer cook painter sailor dentist tailor nurse driver""".split()
)
TOWNS = """Paris London Rome Berlin Madrid Oslo Vienna Tokyo Cairo Lima Dublin Athens Ottawa Lisbon""".split()
SINGLE = {"fish": "fish"}
UNKNOWN = "You did not tell me that."


# Verb -> its base, and the answer to "who has the ...?". The answer names the thing before its owner:
# a copy of the thing out of the question is then the place from which the owner is looked up.
VERBS = {
    "has": ("have", "The {g} is with {n}."),
    "owns": ("own", "The {g} belongs to {n}."),
    "holds": ("hold", "The {g} is held by {n}."),
    "carries": ("carry", "The {g} is carried by {n}."),
    "bought": ("buy", "The {g} was bought by {n}."),
    "got": ("get", "The {g} went to {n}."),
    "found": ("find", "The {g} was found by {n}."),
    "wants": ("want", "The {g} is wanted by {n}."),
}
PAST = ("bought", "got", "found")
# Fact (and the answer ahead), question ahead, question back, the answer back.
TRAITS = (
    ("{n} is {v} years old", "how old is {n}", "who is {v} years old", "The one who is {v} years old is {n}."),
    ("{n} is a {v}", "what is the job of {n}", "who is [the|a] {v}", "The {v} is {n}."),
    ("{n} likes {v}", "what does {n} like", "who likes {v}", "The one who likes {v} is {n}."),
    ("{n} lives in {v}", "where does {n} live", "who lives in {v}", "The one who lives in {v} is {n}."),
)  # fmt: skip
TRAIT_VALUES: tuple[list[str], ...] = ([str(n) for n in range(4, 99)], JOBS, FOODS, TOWNS)


def people(rng: Random, count: int, asked: int | None = None) -> list[str]:
    """Different names. Beside an asked name of the training kind no held-out name stands: else
    training would show those names in contexts, and never once as the answer."""
    found: list[str] = []
    while len(found) < count:
        name = rng.choice(NAMES) if rng.random() < 0.55 else new_name(rng)
        if name not in found:
            found.append(name)
    if asked is None or held_out(f"ctx {found[asked]}"):
        return found
    for at, name in enumerate(found):
        while held_out(f"ctx {name}") or found.count(name) > 1:
            found[at] = name = people(rng, 1)[0]
    return found


def things(rng: Random, count: int) -> list[str]:
    """Different objects, or one object in different colours."""
    if rng.random() < 0.4:
        noun = rng.choice(OBJECTS)
        return [f"{tint} {noun}" for tint in rng.sample(COLOURS, count)]
    found = rng.sample(OBJECTS, count)
    return [f"{rng.choice(COLOURS)} {w}" if rng.random() < 0.4 else w for w in found]


def _both(
    rng: Random, facts: list[str], question: str, answer: str, key: str, fact: str
) -> list[Turn]:
    """The facts and the question in one turn, or the facts first and the question later."""
    roll = rng.random()
    told = rng.choice((". ", ". ", " and ", ", ")).join(facts)
    style = rng.random()
    if style < 0.35:
        told = told.lower()
    if roll < 0.6:
        ask = say(rng, question, wrap=rng.random() < 0.3)
        text = f"{told}{'.' if rng.random() < 0.85 else ','} {ask}"
        if style > 0.9:
            text = f"{ask} {told}."
        return [Turn(text, answer, "context", key, fact=fact)]
    note = rng.choice(("", "", "remember this: ", "listen: ", "note: ", "please remember: "))
    first = Turn(note + told + ".", rng.choice(NOTED[:1]), "noted", key)
    return [first, Turn(say(rng, question), answer, "context", key, fact=fact)]


NOTED = ("All right, I will remember that.",)


def who_has(rng: Random, count: int = 0) -> list[Turn]:
    count = count or rng.randrange(1, 5)
    at = rng.randrange(count)
    names, goods = people(rng, count, at), things(rng, count)
    verb = rng.choice(("has", "has", *VERBS))
    facts = [
        f"{n} {verb} {rng.choice(('the', article(g).split()[0]))} {g}"
        for n, g in zip(names, goods, strict=True)
    ]
    rng.shuffle(facts)
    name, good = names[at], goods[at]
    key = f"ctx {name}"
    base, back = VERBS[verb]
    did = "did" if verb in PAST else "does"
    if rng.random() < 0.12:
        other = people(rng, 1)[0]
        if other not in names:
            return _both(rng, facts, f"what {did} {other} {base}", UNKNOWN, key, UNKNOWN)
    if rng.random() < 0.65:
        question = f"[who {verb}|who {verb}|[tell me|do you know|say] who {verb}] the {good}"
        return _both(rng, facts, question, back.format(g=good, n=name), key, name)
    question = f"[what {did} {name} {base}|tell me what {name} {verb}|and {name}, what {did} {name} {base}]"
    if " " in good and rng.random() < 0.4 and len({g.split()[-1] for g in goods}) == count:
        tint, noun = good.split()
        question = f"what colour is [{name}'s {noun}|the {noun} of {name}]"
        return _both(rng, facts, question, f"{name}'s {noun} is {tint}.", key, tint)
    return _both(rng, facts, question, f"{name} {verb} the {good}.", key, good)


def where_is(rng: Random) -> list[Turn]:
    count = rng.randrange(1, 5)
    at = rng.randrange(count)
    goods = things(rng, count) if rng.random() < 0.6 else people(rng, count, at)
    proper = goods[0][0].isupper()
    places = rng.sample(PLACES, count)
    said = [g if proper else f"the {g}" for g in goods]
    facts = [f"{s[0].upper() + s[1:]} is in the {p}" for s, p in zip(said, places, strict=True)]
    key = f"ctx {goods[at]} {places[at]}" if not proper else f"ctx {goods[at]}"
    answer = f"{said[at][0].upper() + said[at][1:]} is in the {places[at]}."
    if rng.random() < 0.3:
        question = f"{'who is' if proper else '[what is|which thing is]'} in the {places[at]}"
        answer = f"In the {places[at]} is {said[at]}."
    else:
        question = f"[where is|where's|where can i find|do you know where] {said[at]}" + "[| now|]"
    fact = said[at].removeprefix("the ") if answer.startswith("In") else places[at]
    return _both(rng, facts, question, answer, key, fact)


def traits(rng: Random) -> list[Turn]:
    """Age, job, favourite food or home of people."""
    count = rng.randrange(1, 4)
    at = rng.randrange(count)
    names = people(rng, count, at)
    kind = rng.randrange(4)
    values = rng.sample(TRAIT_VALUES[kind], count)
    form, ahead, back, answer_back = TRAITS[kind]
    facts = [form.format(n=n, v=v) for n, v in zip(names, values, strict=True)]
    name, value = names[at], values[at]
    if kind == 0 and count > 1 and rng.random() < 0.3:
        best, words = rng.choice(
            ((max, "[the oldest|older|oldest]"), (min, "[the youngest|younger|youngest]"))
        )
        value = str(best(map(int, values)))
        name = names[values.index(value)]
        word = "oldest" if best is max else "youngest"
        answer = f"At {value}, {name} is the {word}."
        return _both(rng, facts, f"who is {words}", answer, f"ctx {name}", name)
    question, answer, fact = (
        (ahead, form + ".", value) if rng.random() < 0.6 else (back, answer_back, name)
    )
    question, answer = question.format(n=name, v=value), answer.format(n=name, v=value)
    return _both(rng, facts, question, answer, f"ctx {name}", fact)


def transfer(rng: Random) -> list[Turn]:
    """An object changes hands."""
    a, b = people(rng, 2, 1)
    good = rng.choice(OBJECTS)
    verb = rng.choice(("gives", "hands", "passes"))
    facts = [f"{a} has {article(good)}", f"{a} {verb} the {good} to {b}"]
    last = b
    if rng.random() < 0.4:
        (c,) = people(rng, 1)
        if c not in (a, b):
            facts.append(f"{b} {verb} the {good} to {c}")
            last = c
    question = f"who has the {good}[ now|]"
    answer = VERBS["has"][1].format(g=good, n=last)
    return _both(rng, facts, question, answer, f"ctx {last}", last)


MINE = (
    ("my favourite colour is {v}", "my favourite colour", COLOURS),
    ("my favourite food is {v}", "my favourite food", FOODS),
    ("my favourite animal is the {v}", "my favourite animal", [r[0] for r in ANIMALS]),
    (
        "my favourite fruit is the {v}",
        "my favourite fruit",
        [r[0] for r in THINGS if r[1] == "fruit"],
    ),
    (
        "[my dog is called|i have a dog called|my dog's name is|i have a dog named] {v}",
        "the name of my dog",
        NAMES,
    ),
    ("[my cat is called|i have a cat named|my cat's name is] {v}", "the name of my cat", NAMES),
    (
        "[my sister is called|my sister's name is|i have a sister called] {v}",
        "the name of my sister",
        NAMES,
    ),
    ("my brother is called {v}", "the name of my brother", NAMES),
    ("my lucky number is {v}", "my lucky number", [str(n) for n in range(1, 100)]),
    ("the password is {v}", "the password", []),
    ("the code is {v}", "the code", []),
    ("[the number is|remember the number|my number is] {v}", "the number", []),
    ("[the word is|remember the word] {v}", "the word", []),
    ("[i like|i love|i really like] {v}", "what i like", FOODS),
    ("the secret word is {v}", "the secret word", []),
    ("i live in {v}", "my town", TOWNS),
    ("i am {v} years old", "my age", [str(n) for n in range(5, 99)]),
)


def mine(rng: Random) -> list[Turn]:
    """Something about the person who types, asked for later."""
    told, asked, pool = rng.choice(MINE)
    value = (
        rng.choice(pool)
        if pool
        else rng.choice((new_name(rng).lower(), str(rng.randrange(10, 99999))))
    )
    user = say(rng, "[|remember[:|] |please remember [that |]|note: |]" + told, ".", v=value)
    user = user if value in user else user.replace(value.lower(), value)
    noun = asked.replace("my ", "your ").replace("of your", "of your")
    question = f"[what is|what's|tell me|do you remember|what was|do you know|say] {asked}"
    if "name of my" in asked:
        pet = asked.rsplit(" ", 1)[1]
        question = (
            f"[{question}|what is my {pet} called|what's my {pet}'s name|how is my {pet} called]"
        )
    if asked == "my town":
        question, answer = (
            "[where do i live|which town do i live in|what is my town]",
            f"You live in {value}.",
        )
    elif asked == "what i like":
        question, answer = (
            "[what do i like|what did i say i like|tell me what i like]",
            f"You like {value}.",
        )
    elif asked == "my age":
        question, answer = (
            "[how old am i|what is my age|what's my age]",
            f"You are {value} years old.",
        )
    elif "animal" in asked or "fruit" in asked:
        answer = f"{noun[0].upper() + noun[1:]} is the {value}."
    else:
        answer = f"{noun[0].upper() + noun[1:]} is {value}."
    if "name of my" in asked:
        answer = f"Your {asked.rsplit(' ', 1)[1]} is called {value}."
    key = f"mine {asked} {value}"
    first = Turn(user, NOTED[0], "noted", key)
    return [first, Turn(say(rng, question), answer, "context", key, fact=value)]


def name_later(rng: Random) -> list[Turn]:
    turns = introduce(rng)
    return [*turns, recall_name(rng, turns[0].fact)]


def problem(rng: Random) -> list[Turn]:
    """Word problems with one step."""
    (name,) = people(rng, 1)
    noun = rng.choice(
        """apples books coins cookies balls pens eggs cards stamps cars toys cakes fish""".split()
    )
    kind = rng.randrange(4)
    a, b = rng.randrange(2, 60), rng.randrange(1, 40)
    if kind == 0:
        act = rng.choice(("gets {b} more", "buys {b} more", "finds {b} more", "is given {b} more"))
        text = f"{name} has {a} {noun} and {act.format(b=b)}"
        sign, result = "+", a + b
    elif kind == 1:
        a, b = max(a, b), min(a, b)
        act = (
            rng.choice(("eats", "loses", "gives away", "sells", "drops"))
            if noun != "fish"
            else "sells"
        )
        text = f"{name} has {a} {noun} and {act} {b}"
        sign, result = "-", a - b
    elif kind == 2:
        a, b = rng.randrange(2, 13), rng.randrange(2, 11)
        text = f"{name} has {a} bags with {b} {noun} in each"
        sign, result = "x", a * b
    else:
        other = people(rng, 1)[0]
        if other == name:
            return problem(rng)
        text = f"{name} has {a} {noun} and {other} has {b} {noun}"
        question = rng.choice(
            (f"how many {noun} do they have[ together| in all|]", f"how many {noun} are there")
        )
        return _solved(
            rng,
            text,
            question,
            f"{a} + {b} = {a + b}, so they have {a + b} {noun}.",
            a,
            b,
            "+",
            a + b,
        )
    question = rng.choice(
        (
            f"how many {noun} does {name} have[ now| in all| left|]"
            if sign == "-"
            else f"how many {noun} does {name} have[ now| in all|]",
            f"how many {noun} are there[ now|]",
        )
    )
    owned = noun if result != 1 else SINGLE.get(noun, noun[:-1])
    answer = f"{a} {sign} {b} = {result}, so {name} has {result} {owned}."
    return _solved(rng, text, question, answer, a, b, sign, result)


def _solved(
    rng: Random, text: str, question: str, answer: str, a: int, b: int, sign: str, result: int
) -> list[Turn]:
    """One turn out of a word problem."""
    if rng.random() < 0.3:
        text = text.lower()
    ask = say(rng, question, wrap=False)
    return [
        Turn(f"{text}. {ask}", answer, "word problems", f"problem {a} {sign} {b}", fact=str(result))
    ]


def listed_items(rng: Random) -> list[Turn]:
    """A shopping list grows over turns and is read back."""
    goods = rng.sample(
        [r[0] for r in THINGS if r[1] in ("fruit", "vegetable", "food", "drink")],
        rng.randrange(1, 5),
    )
    first = say(
        rng,
        "[my shopping list is|i need to buy|i want to buy|shopping list:] {x}",
        ".",
        wrap=False,
        x=listed(goods),
    )
    key = "shop " + " ".join(sorted(goods))
    turns = [Turn(first, NOTED[0], "noted", key)]
    question = "[what is on my list|what's on my shopping list|what do i need to buy|what did i want to buy|read my list|what is on my shopping list]"
    answer = f"You need {listed(goods)}."
    return [*turns, Turn(say(rng, question), answer, "context", key, fact=goods[0])]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "who_has": (7.0, who_has),
    "where_is": (2.2, where_is),
    "traits": (2.4, traits),
    "transfer": (1.0, transfer),
    "mine": (1.6, mine),
    "name_later": (1.8, name_later),
    "problem": (1.4, problem),
    "listed_items": (0.4, listed_items),
}
