"""Everyday facts: opposites, rhymes, how many of what, why the sky is blue."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny import entries
from recipes.tiny.grammar import Turn, ask, listed, phrasing_key, say, table

OPPOSITES = dict(reversed(table("opposites.txt")))
RHYMES = [row[0].split() for row in table("rhymes.txt")]
GENERAL = entries.read("general.txt")
PLURALS = """cat cats|dog dogs|house houses|tree trees|book books|bus buses|box boxes|fox foxes|glass glasses|
dish dishes|church churches|baby babies|city cities|story stories|lady ladies|day days|toy toys|key keys|
man men|woman women|child children|foot feet|tooth teeth|goose geese|mouse mice|person people|ox oxen|
sheep sheep|fish fish|deer deer|leaf leaves|knife knives|wife wives|life lives|wolf wolves|half halves|
potato potatoes|tomato tomatoes|hero heroes|photo photos|piano pianos|apple apples|car cars|star stars|
watch watches|brush brushes|penny pennies|country countries|family families|party parties|shelf shelves|
loaf loaves|thief thieves|cactus cacti|bird birds|cow cows|horse horses|friend friends|word words"""
PLURAL = [pair.split() for pair in PLURALS.replace("\n", "").split("|")]
PASTS = """go went|see saw|eat ate|drink drank|run ran|come came|take took|give gave|make made|say said|
write wrote|read read|sing sang|swim swam|fly flew|buy bought|bring brought|think thought|find found|
sleep slept|speak spoke|break broke|drive drove|ride rode|know knew|grow grew|throw threw|draw drew|
sit sat|stand stood|win won|lose lost|meet met|feel felt|keep kept|leave left|tell told|hear heard|
begin began|fall fell|get got|have had|be was|do did|walk walked|play played|jump jumped|look looked|
ask asked|work worked|love loved|live lived|open opened|help helped|cook cooked|dance danced|laugh laughed"""
PAST = [pair.split() for pair in PASTS.replace("\n", "").split("|")]
A_OR_AN = """apple owl egg hour dog cat house elephant orange umbrella tree book island car ant king""".split()


def _read_counts() -> list[tuple[list[str], str]]:
    """Forms of each `how many` question; choices hold `|`, so columns are cut at the number."""
    found = []
    for cells in table("counts.txt"):
        at = max(i for i, cell in enumerate(cells) if cell.isdigit())
        found.append(("|".join(cells[:at]).split(";"), "|".join(cells[at + 1 :])))
    return found


COUNTED = _read_counts()


def opposite(rng: Random) -> list[Turn]:
    word = rng.choice(list(OPPOSITES))
    own = (
        "opposite of {x}",
        "{x} [opposite|antonym]",
        "[what's|what is] opposite to {x}",
        "what is not {x} but",
        "the antonym of {x}",
        "give me the opposite[ word|] of {x}",
        "{x} is the opposite of [what|which word]",
        "what word means the opposite of {x}",
        "what is the contrary of {x}",
    )
    user = ask(rng, "the opposite of [{x}|the word {x}]", own, x=word)
    other = OPPOSITES[word]
    return [
        Turn(user, f"The opposite of {word} is {other}.", "opposites", phrasing_key(user), other)
    ]


def rhyme(rng: Random) -> list[Turn]:
    family = rng.choice(RHYMES)
    word = rng.choice(family)
    others = [w for w in family if w != word][:2]
    own = (
        "[what|which words|which word|what words|name a word that] [rhymes|rhyme] with {x}",
        "[give me|find|tell me|i need|say] a [rhyme|word that rhymes] [for|with] {x}",
        "rhyme[s|] [with|for] {x}",
        "a word that rhymes with {x}",
        "do you know a rhyme [for|with] {x}",
        "find a rhyme for {x}",
    )
    user = say(rng, rng.choice(own), x=word)
    answer = f"{listed([w.capitalize() if i == 0 else w for i, w in enumerate(others)])} "
    answer += ("rhyme" if len(others) > 1 else "rhymes") + f" with {word}."
    return [Turn(user, answer, "rhymes", phrasing_key(user), others[0])]


def do_rhyme(rng: Random) -> list[Turn]:
    family = rng.choice(RHYMES)
    a = rng.choice(family)
    b = rng.choice(family if rng.random() < 0.5 else rng.choice(RHYMES))
    if a == b:
        return do_rhyme(rng)
    user = say(rng, "[do {a} and {b} rhyme|does {a} rhyme with {b}]", a=a, b=b)
    same = any(a in f and b in f for f in RHYMES)
    answer = f"Yes, {a} rhymes with {b}." if same else f"No, {a} does not rhyme with {b}."
    return [Turn(user, answer, "rhymes", phrasing_key(user), answer.split(",")[0])]


def how_many(rng: Random) -> list[Turn]:
    forms, answer = rng.choice(COUNTED)
    start = (
        "[how many|how many|hw many|what number of|tell me how many|do you know how many|how many] "
    )
    if forms[0].startswith("eggs"):
        start = "how many "
    user = say(rng, start + rng.choice(forms))
    return [Turn(user, answer, "how many", phrasing_key(user), answer)]


def general(rng: Random) -> list[Turn]:
    return [entries.turn(rng, rng.choice(GENERAL), "general facts")]


def words(rng: Random) -> list[Turn]:
    """Plural, past tense, a or an."""
    kind = rng.randrange(3)
    if kind == 0:
        one, many = rng.choice(PLURAL)
        own = (
            "{x} plural",
            "[more than one {x} is called what|what do you call more than one {x}]",
        )
        user = ask(rng, "the plural of [{x}|the word {x}]", own, x=one)
        answer, fact = f"The plural of {one} is {many}.", many
    elif kind == 1:
        verb, past = rng.choice(PAST)
        user = ask(rng, "the past [tense |]of {x}", ("{x} in the past", "past tense {x}"), x=verb)
        answer, fact = f"The past of {verb} is {past}.", past
    else:
        word = rng.choice(A_OR_AN)
        user = say(rng, "[a or an {x}|do i say a {x} or an {x}|is it a or an {x}]", x=word)
        fact = ("an " if word[0] in "aeiou" or word == "hour" else "a ") + word
        answer = f"It is {fact}."
    return [Turn(user, answer, "word forms", phrasing_key(user), fact)]


KNOWN = (
    ("is fire [hot|cold]", "Fire is hot."),
    ("is ice [hot|cold]", "Ice is cold."),
    ("is snow [hot|cold|black|white]", "Snow is white and cold."),
    ("is the sky [blue|green]", "The sky is blue on a clear day."),
    ("is grass [green|red]", "Grass is green."),
    ("is the sun [hot|cold]", "The Sun is very hot."),
    ("is sugar [sweet|sour]", "Sugar is sweet."),
    ("is a lemon [sweet|sour]", "A lemon is sour."),
    ("is water [wet|dry]", "Water is wet."),
    ("is the earth bigger than the moon", "Yes, the Earth is bigger than the Moon."),
    ("is the sun bigger than the earth", "Yes, the Sun is much bigger than the Earth."),
    ("is the moon bigger than the earth", "No, the Earth is bigger than the Moon."),
    (
        "[which|what] is [bigger|larger], the [sun|sun] or the [earth|moon]",
        "The Sun is much bigger.",
    ),
    ("[which|what] is [bigger|larger], the [earth|moon] or the sun", "The Sun is much bigger."),
    (
        "[which|what] is [bigger|larger], the earth or the moon",
        "The Earth is bigger than the Moon.",
    ),
    (
        "[which|what] is heavier, a [kilo|kilogram] of [iron|steel|lead] or a [kilo|kilogram] of feathers",
        "They weigh the same: one kilogram.",
    ),
    (
        "[which|what] is faster, a [car|plane] or a [bicycle|snail|tortoise]",
        "The one with an engine is faster.",
    ),
    ("can [people|humans] fly", "No, people cannot fly without a machine."),
    ("can [a fish|fish] [walk|fly]", "No, fish swim."),
    ("can [a fish|fish] [live in water|swim]", "Yes, fish live in water."),
    ("can [a dog|dogs|a cat|cats] [talk|speak|read]", "No, animals do not talk."),
    ("do [dogs|cats|cows|horses] lay eggs", "No, they have live young."),
    ("do [birds|chickens|ducks|fish] lay eggs", "Yes, they lay eggs."),
    ("can you eat [stones|a stone|wood|glass|metal]", "No, that is not food."),
    ("can you eat [an apple|bread|rice|a carrot]", "Yes, that is food."),
    ("what do you wear on your [feet|foot]", "One wears shoes and socks on the feet."),
    ("what do you wear on your head", "One wears a hat on the head."),
    ("what do you wear on your hands", "One wears gloves on the hands."),
    ("what do you need when it rains", "When it rains, one needs an umbrella."),
    ("what do you do when you are [tired|sleepy]", "When one is tired, one sleeps."),
    ("what do you do when you are hungry", "When one is hungry, one eats."),
    ("what do you do when you are thirsty", "When one is thirsty, one drinks."),
    ("what do people do at night", "Most people sleep at night."),
    ("what meal do [you|people] eat in the morning", "In the morning people eat breakfast."),
    ("what meal do [you|people] eat at noon", "At noon people eat lunch."),
    ("what meal do [you|people] eat in the evening", "In the evening people eat dinner."),
    ("who [flies|drives] a plane", "A pilot flies a plane."),
    ("who [bakes|makes] bread", "A baker bakes bread."),
    ("who [helps|treats] sick people", "A doctor helps sick people."),
    ("who teaches [children|at school]", "A teacher teaches children."),
    ("who puts out fires", "A firefighter puts out fires."),
    ("who grows [food|wheat|vegetables]", "A farmer grows food."),
    ("where do [children|kids] learn", "Children learn at school."),
    ("where can i [borrow|find many] books", "One can borrow books in a library."),
    ("what do you use to [cut paper|cut]", "One cuts paper with scissors."),
    ("what do you use to write", "One writes with a pen or a pencil."),
    ("what do you open a door with", "One opens a door with a key."),
    ("what shines [at night|in the sky at night]", "The Moon and the stars shine at night."),
    ("what shines [during the day|by day]", "The Sun shines during the day."),
    ("what is the last letter of the alphabet", "The last letter of the alphabet is z."),
)


def known(rng: Random) -> list[Turn]:
    template, answer = rng.choice(KNOWN)
    user = say(rng, template)
    return [Turn(user, answer, "common sense", phrasing_key(user), answer)]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "opposite": (1.5, opposite),
    "rhyme": (0.9, rhyme),
    "do_rhyme": (0.4, do_rhyme),
    "how_many": (1.6, how_many),
    "general": (2.5, general),
    "words": (0.9, words),
    "known": (1.2, known),
}
