"""Elements, planets, colours and animals: what they are, eat, say, look like."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, article, ask, phrasing_key, say, table

ELEMENTS = [
    (int(n), name, symbol, what, other) for n, name, symbol, what, other in table("elements.txt")
]
PLANETS = [(int(n), name, what, moons) for n, name, what, moons in table("planets.txt")]
COLOURS = table("colours.txt")
ANIMALS = table("animals.txt")
THINGS = table("things.txt")
ORDER = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"]
Made = tuple[str, str, str]


def one_turn(made: Made, skill: str) -> list[Turn]:
    user, answer, fact = made
    return [Turn(user, answer, skill, phrasing_key(user), fact=fact)]


def element(rng: Random) -> list[Turn]:
    number, name, symbol, what, other = rng.choice(ELEMENTS)
    typed = other if other and rng.random() < 0.4 else name
    kind = rng.randrange(6)
    if kind < 2:
        own = (
            "{e} symbol",
            "[which|what] symbol does {e} have",
            "how do you write {e} as a symbol",
        )
        user = ask(rng, "the [chemical |]symbol [of|for] {e}", own, e=typed)
        made = (user, f"The symbol of {name} is {symbol}.", symbol)
    elif kind == 2:
        own = (
            "[which|what] element [has|is] [the |]symbol {=s}",
            "[which|what] element is {=s}",
            "what does {=s} stand for [in chemistry|]",
            "{=s} is the symbol of [which|what] element",
        )
        user = say(rng, rng.choice(own), s=symbol)
        made = (user, f"{symbol} is the symbol of {name}.", name)
    elif kind == 3:
        own = (
            "[which|what] number [is|has] [the element |]{e}",
            "[which|what] atomic number has {e}",
        )
        user = ask(rng, "the atomic number of {e}", own, e=typed)
        made = (user, f"The atomic number of {name} is {number}.", str(number))
    elif kind == 4:
        own = (
            "[which|what] element [has|is] [the |][atomic |]number {n}",
            "[which|what] is [the |]element [number |]{n}",
            "element {n}",
            "name element number {n}",
        )
        user = say(rng, rng.choice(own), n=number)
        made = (user, f"Element {number} is {name}.", name)
    else:
        own = ("what is {e}", "[tell me about|what do you know about|describe] [the element |]{e}")
        user = say(rng, rng.choice(own), e=typed)
        sentence = f"{name} is {what}."
        made = (user, sentence[0].upper() + sentence[1:], what)
    return one_turn(made, "elements")


def planet(rng: Random) -> list[Turn]:
    place, name, what, moons = rng.choice(PLANETS)
    kind = rng.randrange(6)
    if kind == 0:
        own = ("[which|what] planet is {x}", "what planet do we call {x}", "name {x}")
        user = say(rng, rng.choice(own), x=what.split(" and ")[0])
        if name == "Mercury" and rng.random() < 0.5:
            user = say(rng, "[which|what] planet is [the |][closest|nearest] to the sun")
        made = (user, f"{name} is {what}.", name)
    elif kind == 1:
        own = ("[which|what] planet is the {o} [from the sun|]", "[name|what is] the {o} planet")
        word = rng.choice(
            (ORDER[place - 1], f"{place}{('st', 'nd', 'rd')[place - 1] if place < 4 else 'th'}")
        )
        user = say(rng, rng.choice(own), o=word)
        made = (user, f"The {ORDER[place - 1]} planet from the Sun is {name}.", name)
    elif kind == 2:
        own = (
            "[what|which] place [has|is] {p} [counted from the sun|in the solar system|]",
            "how far from the sun is {p} in order",
            "which number planet is {p}",
        )
        user = say(rng, rng.choice(own), p=name)
        made = (user, f"{name} is the {ORDER[place - 1]} planet from the Sun.", ORDER[place - 1])
    elif kind == 3:
        user = say(rng, "how many moons [does {p} have|has {p}]", p=name)
        made = (user, f"{name} has {moons}.", moons)
    elif kind == 4:
        own = ("what is {p}", "[tell me about|describe|what do you know about] [the planet |]{p}")
        frame = own[1] if name == "Mercury" else rng.choice(own)
        user = say(
            rng,
            frame if name != "Mercury" else frame.replace("[the planet |]", "the planet "),
            p=name,
        )
        made = (user, f"{name} is {what}.", what)
    else:
        after = rng.random() < 0.5
        if not 1 <= place + (1 if after else -1) <= 8:
            return planet(rng)
        other = PLANETS[place if after else place - 2][1]
        word = "after" if after else "before"
        user = say(rng, f"[which|what] planet [comes|is] {word} {{p}}", p=name)
        made = (user, f"{other} comes {word} {name}.", other)
    return one_turn(made, "planets")


def colour(rng: Random) -> list[Turn]:
    name, code, mixed = rng.choice(COLOURS)
    roll = rng.random()
    c = "[colour|color|colour]"
    if roll < 0.4:
        own = ("{x} [hex|in hex|hex code]", "what is {x} in hex", "how do you write {x} in hex")
        user = ask(rng, "the [hex|hex code|hex name|hex value] [of|for] {x}", own, x=name)
        made = (user, f"The hex code of {name} is {code}.", code)
    elif roll < 0.6:
        own = (
            f"[which|what] {c} is {{x}}",
            f"[which|what] {c} has [the hex code |]{{x}}",
            "what is {x}",
        )
        user = say(rng, rng.choice(own), x=code)
        made = (user, f"{code} is {name}.", name)
    elif mixed:
        a, b = mixed.split(" and ")
        if rng.random() < 0.5:
            own = (
                f"[what|which {c}] do [{{a}} and {{b}}|{{b}} and {{a}}] make",
                "what do i get [if|when] i mix {a} [and|with] {b}",
                f"[which|what] {c} [is|comes from] {{a}} [and|plus|mixed with] {{b}}",
                "mix {a} [and|with] {b}",
                "{a} [and|plus|+] {b} makes [what|which colour|]",
            )
            user = say(rng, rng.choice(own), a=a, b=b)
        else:
            own = ("how do [i|you|we] [make|mix|get] [the colour |]{x}", "what makes {x}")
            user = say(rng, rng.choice(own), x=name)
        made = (user, f"{mixed[0].upper() + mixed[1:]} make {name}.", name)
    else:
        return colour(rng)
    return one_turn(made, "colours")


def animal(rng: Random) -> list[Turn]:
    row = rng.choice(ANIMALS)
    name = row[0]
    one = article(name)
    many = {
        "mouse": "mice",
        "sheep": "sheep",
        "goose": "geese",
        "wolf": "wolves",
        "fox": "foxes",
        "deer": "deer",
        "moose": "moose",
        "fly": "flies",
        "butterfly": "butterflies",
        "salmon": "salmon",
        "trout": "trout",
        "goldfish": "goldfish",
        "ostrich": "ostriches",
        "octopus": "octopuses",
        "mosquito": "mosquitoes",
        "donkey": "donkeys",
    }.get(name, name + "s")
    made = (_body if rng.random() < 0.5 else _life)(rng, row, one, many)
    return one_turn(made, "animals") if made else animal(rng)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _body(rng: Random, row: list[str], one: str, many: str) -> Made | None:
    name, kind, legs, _, _, _, _, tint, flies = row
    roll = rng.randrange(5)
    if roll == 0:
        own = ("how many legs does {x} have", "how many legs [do {m} have|has {x}]", "{m} legs")
        if name in ("seal", "snail", "octopus", "crab", "lobster"):
            return None
        count = "no legs" if legs == "0" else f"{legs} legs"
        return say(rng, rng.choice(own), x=one, m=many), f"{capital(one)} has {count}.", count
    if roll == 1:
        own = (
            "[what|which] [colour|color] is {x}",
            "[what|which] [colour|color] [do|are] {m}[ have|]",
        )
        own = (own[0], "[what|which] colour are {m}", "{x} is [what|which] colour")
        return say(rng, rng.choice(own), x=one, m=many), f"{capital(one)} is usually {tint}.", tint
    if roll == 2:
        own = ("can {x} fly", "can {m} fly", "do {m} fly", "does {x} fly")
        if name == "chicken":
            return None
        can = f"Yes, {one} can fly." if flies == "y" else f"No, {one} cannot fly."
        return say(rng, rng.choice(own), x=one, m=many), can, can.split(",")[0]
    if roll == 3:
        own = (
            "[what|which] kind of animal is {x}",
            "what is {x}",
            "what are {m}",
            "tell me about {m}",
            "what sort of animal is {x}",
            "{x} is what kind of animal",
        )
        if kind == "worm":
            return None
        answer = f"{capital(one)} is {article(kind)}. It lives in {row[6]}."
        if row[6].startswith(("almost", "near", "its", "water", "dry", "warm")):
            answer = f"{capital(one)} is {article(kind)}. It is usually {tint}."
        return say(rng, rng.choice(own), x=one, m=many), answer, kind
    other = rng.choice(("mammal", "bird", "fish", "insect", "reptile", kind, kind))
    user = say(rng, "is {x} {k}", x=one, k=article(other))
    if other == kind:
        return user, f"Yes, {one} is {article(kind)}.", "Yes"
    return user, f"No, {one} is {article(kind)}.", kind


def _life(rng: Random, row: list[str], one: str, many: str) -> Made | None:
    _, _, _, sound, young, food, home, _, _ = row
    roll = rng.randrange(5)
    if roll == 0 and sound:
        own = (
            "[what|which] sound does {x} make",
            "what does {x} say",
            "[what|which] [sound|noise] do {m} make",
            "what noise does {x} make",
            "how does {x} sound",
            "sound of {x}",
        )
        answer = f"{capital(many)} {sound}."
        return say(rng, rng.choice(own), x=one, m=many), answer, sound
    if roll == 1 and young:
        own = (
            "what is a baby {b} called",
            "[what|how] do you call a [baby|young] {b}",
            "what is the young of {x} called",
            "what do we call a baby {b}",
            "name of a baby {b}",
            "baby {b}",
        )
        user = say(rng, rng.choice(own), x=one, b=row[0])
        return user, f"A young {row[0]} is called {article(young)}.", young
    if roll == 2:
        own = ("what does {x} eat", "what do {m} eat", "what is the food of {x}", "{m} eat what")
        return say(rng, rng.choice(own), x=one, m=many), f"{capital(many)} eat {food}.", food
    if roll == 3:
        own = (
            "where does {x} live",
            "where do {m} live",
            "where can i find {x}",
            "where is the home of {x}",
        )
        where = home if home.startswith(("almost", "near")) else f"in {home}"
        if home.startswith(
            (
                "the beach",
                "the coast",
                "a farm",
                "a city roof",
                "warm rocks",
                "dry",
                "the plains",
                "the ice",
            )
        ):
            where = f"on {home}"
        return say(rng, rng.choice(own), x=one, m=many), f"{capital(many)} live {where}.", where
    if roll == 4 and sound and sum(r[3] == sound for r in ANIMALS) == 1:
        own = ("[which|what] animal [can |]{s}s", "who {s}s", "[which|what] animal makes {s}")
        user = say(
            rng,
            "[which|what|name an] animal " + f"[that |]{sound}s" if rng.random() < 0.4 else own[2],
            s=sound,
        )
        return user, f"{capital(many)} {sound}.", many
    return None


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "element": (2.0, element),
    "planet": (1.0, planet),
    "colour": (1.2, colour),
    "animal": (3.5, animal),
}
