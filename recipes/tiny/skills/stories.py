"""Tiny stories from a hero, a place, an object and a mood: three plots, many ways of telling."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, article, expand, say

HEROES = """dragon knight fox rabbit robot wizard princess cat dog mouse bear owl king queen sailor
baker frog turtle girl boy giant witch pirate farmer horse pig lion tiger elephant bird
duck bee snail monster ghost astronaut prince wolf hedgehog penguin fairy dwarf teacher
doctor spider whale squirrel monkey goat kitten puppy child""".split()
PLACES = """forest castle village garden cave island mountain beach desert river lake city tower farm
school library market kitchen ship valley jungle harbour bridge park museum meadow moon
swamp train bakery hill""".split()
OBJECTS = """key lamp book map ring sword hat ball bell coin crown cup drum flute kite letter mirror
rope shell star stone umbrella box cake boat feather button clock basket pearl apple egg
balloon candle compass cookie blanket""".split()
MOODS = """happy sad brave tired angry lonely curious proud afraid hungry calm excited shy sleepy
cheerful worried bored grumpy kind lazy""".split()
PLAIN = """table chair train cheese bicycle pencil carrot potato cloud rain snow window phone
computer spoon shoe sock chair lemon banana tree flower camera guitar piano""".split()

KINDS = (
    """little old young pirate robot baby big clever magic green red tiny silver toy wild""".split()
)
SORTS = """lost golden magic old red blue broken secret wooden little silver paper glass green""".split()

OPENINGS = (
    "Once upon a time there was [a|one] {m} {h}.",
    "Once there [was|lived] {am} {h}.",
    "{Ah} lived near a {p}. It was {m} that day.",
    "Long ago {am} {h} lived [by|close to|not far from] a {p}.",
    "There was once {am} {h} who lived alone.",
    "One morning {am} {h} woke up [early|late|in the rain|with a smile|with a plan].",
    "In a [small|quiet|green|far] land lived {am} {h}.",
)
GO = (
    "It walked to the {p} and found {ao} [in the grass|under a leaf|behind a wall|on the ground].",
    "One day it went to the {p} to look for {ao}.",
    "At the {p} it saw {ao} [shining|lying] in the [sun|dust|light|rain].",
    "It [wished for|dreamt of] {ao} and set out for the {p}.",
    "On the way to the {p} it [nearly fell over|stepped on|picked up|spotted] {ao}.",
)
LOSE = (
    "But the {o} [fell into the water|rolled away|was too heavy|slipped out of its hands].",
    "Then the wind came and [took|blew away] the {o}.",
    "Suddenly the {o} was gone.",
    "Soon the {o} [broke|was lost|was stuck] and everything went quiet.",
    "A [crow|stranger|cloud of dust] came and the {o} was gone.",
)
SEEK = (
    "The {h} looked [everywhere|behind every stone|all day] and asked [everyone|a friend|an old owl] for help.",
    "A friend [came by|heard it] and they [searched|looked] together.",
    "The {h} sat down, [took a breath|counted to ten|had an idea] and tried again.",
    "It took [a rope|a stick|a deep breath] and did not give up.",
)
FIND = (
    "In the end they found the {o} and [laughed|danced|sang] [all night|for a long time|together].",
    "At last the {o} was back, and the {h} [smiled|was glad|slept well].",
    "When the sun set, the {h} held the {o} [again|in its arms|at last].",
)
GIFT = (
    "A [child|stranger|small bird|friend] at the {p} was in need of the {o}.",
    "Somebody at the {p} was crying because the {o} was [lost|theirs|missing].",
    "There it met [a neighbour|an old man|a lonely child] who had lost the {o}.",
)
GIVE = (
    "The {h} gave the {o} away and felt [warm|light|good] inside.",
    "So the {h} handed over the {o} without a word.",
    "The {h} said: take the {o}, it is yours.",
)
FRIEND = (
    "From that day on they were friends.",
    "They shared bread and [told stories|watched the stars|laughed] until late.",
    "And nobody at the {p} was ever alone again.",
    "Everyone at the {p} still talks about it.",
)
SECRET = (
    "Inside the {o} there was a [small light|tiny note|secret|quiet song].",
    "The {o} began to [glow|hum|whisper|shake].",
    "When the {h} touched the {o}, a door opened in the {p}.",
)
FOLLOW = (
    "The {h} followed the [light|sound|path] deep into the {p}.",
    "It said: come with me. The {h} [went along|was not afraid|ran after it].",
    "Step by step the {h} came to a [hidden room|golden gate|little house].",
)
WONDER = (
    "There stood a [table full of cakes|tree of silver|choir of mice|warm fire].",
    "Behind it lay the [most beautiful garden|widest sea|brightest stars] anyone had seen.",
    "There all the lost things of the world were waiting.",
)
ENDINGS = (
    "The {h} was never {m} again without [thinking of|remembering] that day.",
    "And that is how the {m} {h} [found|got] a home.",
    "That night the {h} slept [well|deeply|with a smile].",
    "The end.",
    "And if you go to the {p}, you may see the {h} there today.",
    "Since then the {h} keeps the memory [safe|close].",
)
PLOTS = ((GO, LOSE, SEEK, FIND), (GO, GIFT, GIVE, FRIEND), (GO, SECRET, FOLLOW, WONDER))


def tell(rng: Random, hero: str, place: str, thing: str, mood: str) -> str:
    """A story of six sentences with the four words in it."""
    fields = {
        "{h}": hero,
        "{p}": place,
        "{o}": thing,
        "{m}": mood,
        "{ao}": article(thing),
        "{am}": article(mood),
        "{Ah}": article(hero).capitalize(),
    }
    steps = (OPENINGS, *rng.choice(PLOTS), ENDINGS)
    while True:
        text = " ".join(expand(rng, rng.choice(step)) for step in steps)
        text = text.replace("[a|one] {m}", article(mood)).replace("a {m}", article(mood))
        for field, value in fields.items():
            text = text.replace(field, value)
        lower = text.lower()
        if all(w in lower for w in (hero, place, thing, mood)):
            return text


STORY = "[tell me|tell|write|make up|write me|i want|give me|can you tell me|can you write|please tell|invent] "
A_STORY = "[a|a|a|a short|a tiny|a little|one|another] [story|story|tale|bedtime story|short story]"
ASKED_FOUR = (
    STORY + A_STORY + " about {ah} in [a|the] {p} with {ao}[. mood: {m}|, and make it {m}|, {m}]",
    STORY + A_STORY + " about {am} {h}, a {p} and {ao}",
    STORY + A_STORY + " about {am} {h} in a {p} [with|who finds|and] {ao}",
    STORY + A_STORY + " with [the words |these words: |]{h}, {p}, {o}[,| and|, and] {m}",
    "[use|take] the words {h}, {p}, {o} and {m} in a story",
    "story[:|] hero {h}, place {p}, object {o}, mood {m}",
    "hero: {h}, place: {p}, object: {o}, mood: {m}",
    "[story|tale] [with|about]: {h}, {p}, {o}, {m}",
    STORY + A_STORY + ": {h}, {p}, {o}, {m}",
    STORY + A_STORY + " where {am} {h} finds {ao} in a {p}",
)
ASKED_SOME = (
    (STORY + A_STORY + " about {ah}", "h"),
    (STORY + A_STORY + " about the {h}", "h"),
    ("[story|tale|a story|a tale|stories] about {ah}", "h"),
    (STORY + A_STORY + " about {ah} and {ao}", "ho"),
    (STORY + A_STORY + " about {ah} in [a|the] {p}", "hp"),
    (STORY + A_STORY + " about {am} {h}", "hm"),
    (STORY + A_STORY + " about {ao}", "o"),
    (STORY + A_STORY + " [set in|in|about] a {p}", "p"),
    (STORY + A_STORY + " with {ah} and {ao}", "ho"),
    ("{ah} and {ao}: [tell me a story|story please|make a story]", "ho"),
    (STORY + A_STORY + " about {ah} who [finds|loses|looks for|has] {ao}", "ho"),
    (STORY + A_STORY + " about {am} {h} in a {p}", "hmp"),
)
ASKED_NONE = (
    STORY + A_STORY + "[| for kids| for children| please| before bed]",
    "[story|a story|story please|story time|tell a story|another story|bedtime story|short story|"
    "do you know a story|do you know any stories|can you tell stories|tell me something for bedtime|"
    "once upon a time|a fairy tale|write a fairy tale|tell me a fairy tale|can you make up a story|"
    "a story with a happy end|i want to hear a story|read me a story|one more story]",
)


def story(rng: Random) -> list[Turn]:
    heroes = HEROES if rng.random() < 0.9 else PLAIN
    objects = OBJECTS if rng.random() < 0.85 else PLAIN
    h, p, o, m = (rng.choice(x) for x in (heroes, PLACES, objects, MOODS))
    if h == o:
        return story(rng)
    if rng.random() < 0.15:
        h = f"{rng.choice(KINDS)} {h}"
    if rng.random() < 0.15:
        o = f"{rng.choice(SORTS)} {o}"
    named = {"h": h, "p": p, "o": o, "m": m}
    roll = rng.random()
    if roll < 0.5:
        frame, used = rng.choice(ASKED_FOUR), "hpom"
    elif roll < 0.85:
        frame, used = rng.choice(ASKED_SOME)
    else:
        frame, used = rng.choice(ASKED_NONE), ""
    user = say(rng, frame, ".", ah=article(h), ao=article(o), am=article(m), **named)
    wanted = tuple(w for k, w in named.items() if "{" + k + "}" in frame or "{a" + k + "}" in frame)
    # Words that an optional choice left out are not asked for.
    wanted = tuple(w for w in wanted if w in user.lower())
    key = f"story {h} {p} {o} {m}" if used else ""
    return [Turn(user, tell(rng, h, p, o, m), "stories", key, words=wanted)]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {"story": (3.2, story)}
