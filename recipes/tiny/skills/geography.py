"""Countries: capital, continent, currency, language, forward and reverse, yes and no."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from recipes.tiny.grammar import Turn, ask, listed, phrasing_key, say, table


@dataclass(frozen=True)
class Country:
    """One row of facts/countries.txt."""

    name: str
    capital: str
    continent: str
    currency: str
    language: str
    names: tuple[str, ...]

    @property
    def start(self) -> str:
        """The name at the start of a sentence."""
        return self.name[0].upper() + self.name[1:]


def _countries() -> list[Country]:
    rows = []
    for name, capital, continent, currency, language, others in table("countries.txt"):
        names = (name, name, name, *[o for o in others.split(";") if o])
        rows.append(Country(name, capital, continent, currency, language, names))
    return rows


COUNTRIES = _countries()
CAPITALS = [c for c in COUNTRIES if c.capital not in (c.name, "Monaco", "San Marino")]
BY_CURRENCY = {
    c.currency: c for c in COUNTRIES if sum(d.currency == c.currency for d in COUNTRIES) == 1
}
BY_LANGUAGE = {
    c.language: c
    for c in COUNTRIES
    if c.language and sum(d.language == c.language for d in COUNTRIES) == 1
}
KNOWN = """France Germany Spain Italy Japan China India Egypt Brazil Canada Australia Mexico Russia
Greece Portugal Poland Sweden Norway Turkey Argentina Kenya Ireland Austria Switzerland
Peru Cuba""".split()
WELL_KNOWN = [c for c in COUNTRIES if c.name in KNOWN or c.name.startswith("the United")]


def pick(rng: Random) -> Country:
    """A country; the best known ones a little more often, as in real questions."""
    return rng.choice(WELL_KNOWN if rng.random() < 0.15 else COUNTRIES)


CAPITAL_OWN = (
    "[which|what] city is the capital of {c}",
    "[which|what] is the capital [city |]of {c}",
    "{c}[ capital|'s capital|'s capital city]",
    "capital of {c}",
    "capital [city |]{c}",
    "the capital of {c} is [called|]",
    "[do you know|name] the capital of {c}",
    "{c} has [which|what] capital",
    "what is {c}'s capital[ city|]",
    "what's the capital city of {c}",
    "where is the [government|capital] of {c}",
    "what do you call the capital of {c}",
    "how is the capital of {c} called",
)


def capital(rng: Random) -> list[Turn]:
    c = pick(rng)
    user = ask(rng, "the capital [city |]of {c}", CAPITAL_OWN, c=rng.choice(c.names))
    answer = f"The capital of {c.name} is {c.capital}."
    return [Turn(user, answer, "capitals", phrasing_key(user), fact=c.capital)]


def country_of(rng: Random) -> list[Turn]:
    c = rng.choice(CAPITALS)
    own = (
        "{x} is the capital of [which|what] country",
        "{x} is the capital of [what|]",
        "[which|what] country [has|is] [the capital |]{x}[ as its capital|]",
        "[which|what] country's capital is {x}",
        "of [which|what] country is {x} the capital",
        "[in |][which|what] country is {x} [in|]",
        "where is {x}",
        "where does {x} lie",
        "which country does {x} belong to",
        "what is {x} the capital of",
        "what is {x}",
        "tell me about {x}",
    )
    user = say(rng, rng.choice(own), x=c.capital)
    answer = f"{c.capital} is the capital of {c.name}."
    return [Turn(user, answer, "capitals", phrasing_key(user), fact=c.name)]


def is_capital(rng: Random) -> list[Turn]:
    c = pick(rng)
    other = c.capital if rng.random() < 0.5 else rng.choice(CAPITALS).capital
    own = (
        "is {x} the capital of {c}",
        "is the capital of {c} {x}",
        "{x} is the capital of {c}, right",
    )
    user = say(rng, rng.choice(own), x=other, c=rng.choice(c.names))
    answer = f"Yes, the capital of {c.name} is {c.capital}."
    if other != c.capital:
        answer = f"No, the capital of {c.name} is {c.capital}."
    return [Turn(user, answer, "capitals", phrasing_key(user), fact=c.capital)]


def continent(rng: Random) -> list[Turn]:
    c = pick(rng)
    own = (
        "[which|what] continent is {c} [in|on|part of|]",
        "[in|on] [which|what] continent is {c}",
        "where is {c}",
        "where in the world is {c}",
        "where does {c} lie",
        "which part of the world is {c} in",
        "which continent does {c} belong to",
    )
    user = ask(rng, "the continent of {c}", own, c=rng.choice(c.names))
    answer = f"{c.start} is in {c.continent}."
    return [Turn(user, answer, "continents", phrasing_key(user), fact=c.continent)]


CONTINENTS = sorted({c.continent for c in COUNTRIES})


def is_in(rng: Random) -> list[Turn]:
    c = pick(rng)
    other = c.continent if rng.random() < 0.5 else rng.choice(CONTINENTS)
    own = (
        "is {c} in {x}",
        "is {c} a country in {x}",
        "does {c} lie in {x}",
        "{c} is in {x}, right",
    )
    user = say(rng, rng.choice(own), x=other, c=rng.choice(c.names))
    answer = f"{'Yes' if other == c.continent else 'No'}, {c.name} is in {c.continent}."
    return [Turn(user, answer, "continents", phrasing_key(user), fact=c.continent)]


def city_in(rng: Random) -> list[Turn]:
    c = rng.choice(CAPITALS)
    other = c if rng.random() < 0.5 else pick(rng)
    user = say(rng, "is {x} [in|a city in|part of] {c}", x=c.capital, c=rng.choice(other.names))
    answer = f"{'Yes' if other == c else 'No'}, {c.capital} is the capital of {c.name}."
    return [Turn(user, answer, "capitals", phrasing_key(user), fact=c.name)]


def currency(rng: Random) -> list[Turn]:
    c = pick(rng)
    own = (
        "[what|which] currency [does|do] [{c}|they|people] use[ in {c}|]",
        "[what|which] currency is used in {c}",
        "[what|which] money [do they use|is used|do people use|do you pay with] in {c}",
        "[how|with what] do [you|people] pay in {c}",
        "{c} currency",
        "what is {c}'s currency",
        "what [kind of |]money [does {c} have|do they have in {c}]",
    )
    frame = rng.choice(own)
    if "{c}|they" in frame:
        frame = "[what|which] currency does {c} use"
    user = ask(rng, "the [currency|money] of {c}", (frame,), c=rng.choice(c.names))
    answer = f"The currency of {c.name} is the {c.currency}."
    return [Turn(user, answer, "currencies", phrasing_key(user), fact=c.currency)]


def currency_of(rng: Random) -> list[Turn]:
    name = rng.choice(sorted(BY_CURRENCY))
    c = BY_CURRENCY[name]
    own = (
        "[which|what] country uses the {x}",
        "where [do people|do they|can i] pay with the {x}",
        "the {x} is the currency of [which|what] country",
        "where is the {x} used",
        "[which|what] country has the {x}",
        "what is the {x}",
    )
    user = say(rng, rng.choice(own), x=name)
    answer = f"The {name} is the currency of {c.name}."
    return [Turn(user, answer, "currencies", phrasing_key(user), fact=c.name)]


def language(rng: Random) -> list[Turn]:
    c = pick(rng)
    while not c.language:
        c = pick(rng)
    own = (
        "[what|which] language [do they|do people] speak in {c}",
        "[what|which] language is spoken in {c}",
        "[what|which] language does one speak in {c}",
        "what do [they|people] speak in {c}",
        "what language has {c}",
        "how do people speak in {c}",
        "{c} language",
    )
    user = ask(rng, "the [main |official |]language of {c}", own, c=rng.choice(c.names))
    answer = f"The main language of {c.name} is {c.language}."
    return [Turn(user, answer, "languages", phrasing_key(user), fact=c.language)]


def about(rng: Random) -> list[Turn]:
    c = pick(rng)
    own = (
        "[tell me about|what do you know about|describe|tell me something about|what can you tell me "
        "about|say something about|do you know|info about|facts about|give me a fact about] {c}",
        "what is {c}",
        "[is|so] {c} a [country|city|continent]",
        "what kind of place is {c}",
    )
    user = say(rng, rng.choice(own), c=rng.choice(c.names))
    answer = f"{c.start} is a country in {c.continent}. Its capital is {c.capital}."
    return [Turn(user, answer, "countries", phrasing_key(user), fact=c.capital)]


def several(rng: Random) -> list[Turn]:
    """Some countries of a continent, always the same ones so that the answer is known."""
    place = rng.choice(CONTINENTS)
    n = rng.randrange(1, 6)
    found = sorted(c.name for c in WELL_KNOWN if c.continent == place)
    found += [c.name for c in COUNTRIES if c.continent == place and c.name not in found]
    words = ["one", "two", "three", "four", "five"]
    typed = rng.choice((str(n), words[n - 1], words[n - 1]))
    many = "country" if n == 1 else "countries"
    own = (
        "[name|list|give me|tell me|say|can you name|can you list] {n} "
        + many
        + " [in|of|from] {x}",
        "[what are|which are] {n} " + many + " in {x}",
        "{n} " + many + " in {x}",
    )
    if n == 3 and rng.random() < 0.5:
        typed = rng.choice(("some", "a few"))
    user = say(rng, rng.choice(own), n=typed, x=place)
    answer = listed(found[:n])
    answer = answer[0].upper() + answer[1:] + "."
    return [Turn(user, answer, "some countries", phrasing_key(user), fact=found[0])]


def ellipsis(rng: Random) -> list[Turn]:
    """A question about one country, then `and of Spain?`."""
    kind = rng.choice((capital, continent, currency, language))
    turns = kind(rng)
    for _ in range(rng.randrange(1, 3)):
        c = pick(rng)
        while kind is language and not c.language:
            c = pick(rng)
        own = (
            "and [of |in |for |]{c}",
            "[what|how] about {c}",
            "what about {c}",
            "{c}",
            "ok and {c}",
        )
        user = say(rng, rng.choice(own), wrap=False, c=rng.choice(c.names))
        if kind is capital:
            answer, fact = f"The capital of {c.name} is {c.capital}.", c.capital
        elif kind is continent:
            answer, fact = f"{c.start} is in {c.continent}.", c.continent
        elif kind is currency:
            answer, fact = f"The currency of {c.name} is the {c.currency}.", c.currency
        else:
            answer, fact = f"The main language of {c.name} is {c.language}.", c.language
        turns.append(Turn(user, answer, "country follow-up", phrasing_key(user), fact=fact))
    return turns


def its(rng: Random) -> list[Turn]:
    """A question about a country, then one that says only `it` or `there`."""
    turns = about(rng) if rng.random() < 0.4 else capital(rng)
    name = turns[0].answer
    c = next(c for c in COUNTRIES if c.name in name or (c.start in name and c.capital in name))
    for d in COUNTRIES:
        if f"of {d.name} is" in name or name.startswith(f"{d.start} is a country"):
            c = d
    kind = rng.randrange(3)
    if kind == 0:
        user = say(rng, "[what|which] [currency|money] do they use[ there|]", wrap=False)
        answer, fact = f"The currency of {c.name} is the {c.currency}.", c.currency
    elif kind == 1 and c.language:
        user = say(rng, "[what|which] language do [they|people] speak[ there|]", wrap=False)
        answer, fact = f"The main language of {c.name} is {c.language}.", c.language
    else:
        user = say(rng, "[which|what] continent is [it|that|this] [in|on]", wrap=False)
        answer, fact = f"{c.start} is in {c.continent}.", c.continent
    return [*turns, Turn(user, answer, "country follow-up", "", fact=fact)]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "capital": (4.0, capital),
    "country_of": (2.2, country_of),
    "is_capital": (0.9, is_capital),
    "continent": (2.2, continent),
    "is_in": (0.8, is_in),
    "city_in": (0.6, city_in),
    "currency": (2.4, currency),
    "currency_of": (0.9, currency_of),
    "language": (2.0, language),
    "about": (0.8, about),
    "several": (0.5, several),
    "ellipsis": (1.2, ellipsis),
    "its": (0.6, its),
}
