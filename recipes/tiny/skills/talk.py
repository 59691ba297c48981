"""Small talk: greetings, who it is, feelings, jokes, and the end of a conversation."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny import entries
from recipes.tiny.grammar import Turn, expand, phrasing_key, say, table

TALK = entries.read("talk.txt")
BY_NAME = {entry.name: entry for entry in TALK}
PIECES = {entry.name: entry for entry in entries.read("pieces.txt")}
STATEMENTS = {
    "iamfine",
    "iamsad",
    "bored",
    "angry",
    "hungry",
    "thirsty",
    "thanks",
    "praise",
    "bye",
    "insult",
    "ok",
    "welcome",
    "hello",
    "morning",
    "evening",
    "afternoon",
    "agree",
}
COMMON = (
    "hello",
    "hello",
    "hello",
    "howareyou",
    "howareyou",
    "thanks",
    "thanks",
    "bye",
    "bye",
    "name",
    "name",
    "cando",
    "cando",
    "ok",
    "iamsad",
    "what",
)
PIECE_ASKED = {
    "joke": (
        "[tell me|tell|do you know|give me|say|i want|i'd like|can you tell me|know] [a|another|one more|"
        "a funny|any|a good|a short|some] [joke|jokes]",
        "[make me laugh|make me smile|say something funny|be funny|joke|joke please|another joke|"
        "got any jokes|do you know any jokes|another one please, a joke|can you be funny]",
    ),
    "fact": (
        "[tell me|give me|do you know|say|share|can you tell me] [a|another|one|any|an] "
        "[fun fact|fact|interesting fact|curious fact|random fact|cool fact]",
        "[tell me something|do you know something] [interesting|new|i don't know|cool|surprising|fun]",
        "[fun fact|teach me something|surprise me with a fact|did you know|teach me something new]",
    ),
    "riddle": (
        "[tell me|give me|do you know|ask me|say|can you give me] [a|another|any|one] [riddle|puzzle]",
        "[riddle|riddle me|riddle please|let's do a riddle]",
    ),
    "advice": (
        "[give me|do you have|tell me|i need] [some|any|a piece of|good|] advice[ for life| for today|]",
        "[motivate me|inspire me|give me a tip for life|any wise words|say something wise|"
        "give me some motivation|tell me something wise|a quote please|give me a quote]",
    ),
    "poem": (
        "[write|tell me|say|write me|make|recite|give me|can you write|compose] [a|another|a short|a little|"
        "one|a tiny] [poem|rhyme|verse|haiku|song]",
        "[poem|a poem please|can you sing|sing|sing a song|sing something|sing for me|write poetry|"
        "do you know a poem|can you rhyme|can you write poems]",
        "[write|tell me|make|write me] [a poem|a short poem|a song] about [the moon|love|rain|the sea|"
        "winter|a cat|friends|the sun|a dog|my mother|spring|the night|a tree|flowers]",
    ),
}
NAMES = [row[0] for row in table("names.txt")]


def talk(rng: Random) -> list[Turn]:
    entry = BY_NAME[rng.choice(COMMON)] if rng.random() < 0.3 else rng.choice(TALK)
    mark = rng.choice(("!", ".", "")) if entry.name in STATEMENTS else "?"
    if entry.name in ("hello", "ok", "thanks", "bye", "welcome"):
        _, template = rng.choice(entry.questions)
        user = say(rng, template, mark, wrap=False)
    else:
        user = entries.question(rng, entry, mark)
    answer = rng.choice(entry.answers)
    return [Turn(" ".join(user.split()), answer, "talk", phrasing_key(user), "", entry.answers)]


def piece(rng: Random) -> list[Turn]:
    kind = rng.choice(("joke", "joke", "joke", "fact", "fact", "riddle", "advice", "poem", "poem"))
    told = list(PIECES[kind].answers)
    user = say(rng, rng.choice(PIECE_ASKED[kind]))
    answer = rng.choice(told)
    turns = [Turn(user, answer, "pieces", phrasing_key(user), "", tuple(told))]
    while rng.random() < 0.35 and len(told) > 1:
        told.remove(turns[-1].answer)
        more = say(
            rng,
            "[another|another one|one more|again|more|and another one|next|tell me another]",
            ".",
        )
        turns.append(Turn(more, rng.choice(told), "pieces", "", "", tuple(told)))
    return turns


def introduce(rng: Random) -> list[Turn]:
    """A person says a name; later it is asked for. Names are held out as content."""
    name = rng.choice(NAMES) if rng.random() < 0.6 else new_name(rng)
    told = rng.choice((name, name, name.lower()))
    own = (
        "[my name is|i am called|call me|you can call me|my name's|people call me|they call me|"
        "please call me] {=n}",
        "[hi|hello|hey], [i am|i'm|my name is|this is|im|it's] {=n}",
        "[i am|i'm] {=n}",
        "[hi|hello|hey] [tiny|], [i'm|my name is] {=n}[, nice to meet you|, who are you|]",
        "[remember|please remember] [that |]my name is {=n}",
        "{=n} is my name",
        "the name is {=n}",
    )
    user = say(rng, rng.choice(own), rng.choice((".", "!", "")), wrap=False, n=told)
    key = f"name {name}"
    answer = f"Nice to meet you, {name}!"
    return [Turn(user, answer, "remember name", key, fact=name)]


REMARKS = (
    ("i [like|love|really like|enjoy|prefer] {x}", "{X} sounds nice!"),
    (
        "i [have|own|bought|got|want|need|found|lost|see|saw] [a|my|the|a new|an old] {y}",
        "Tell me more about your {y}.",
    ),
    (
        "my [{y}] is [nice|old|new|red|big|small|very good|my favourite]",
        "Tell me more about your {y}.",
    ),
    ("i [do not like|don't like|hate|dislike] {x}", "Not everyone likes {x}."),
    (
        "i am [going to|at|in|on the way to] [the park|school|work|the shop|the library|the beach|the cinema|a party]",
        "Have a good time!",
    ),
    (
        "i [played|worked|slept|ate|read|walked|swam|cooked] [today|yesterday|a lot|all day|in the morning]",
        "That sounds like a full day.",
    ),
    (
        "[it is|it's] [raining|sunny|cold|hot|snowing|dark|late|early|windy] [here|today|outside|]",
        "I have no window, so thank you for telling me.",
    ),
    (
        "[this is|it is|that is] [fun|hard|easy|strange|funny|great fun]",
        "I am glad that you try me out.",
    ),
    (
        "i am [a|the] [teacher|student|doctor|programmer|nurse|cook|driver|child|developer|engineer|writer]",
        "That is a fine thing to be.",
    ),
    (
        "i am from [france|germany|spain|italy|japan|india|brazil|canada|the usa|england|poland]",
        "That is a nice place to come from.",
    ),
    (
        "i [am learning|study|learn|work on] [english|maths|music|python|history|chess|biology]",
        "Good luck with it!",
    ),
)
LIKED = (
    """music cats dogs books football winter summer rain coffee tea flowers trains maths""".split()
)


def remark(rng: Random) -> list[Turn]:
    """A statement that asks for nothing gets a short friendly answer."""
    said, answer = rng.choice(REMARKS)
    x, y = (
        rng.choice(LIKED),
        rng.choice(
            ["dog", "cat", "bike", "car", "house", "garden", "friend", "book", "phone", "sister"]
        ),
    )
    user = say(rng, said.replace("[{y}]", "{y}"), rng.choice(".!"), x=x, y=y)
    answer = answer.replace("{X}", x.capitalize()).replace("{x}", x).replace("{y}", y)
    return [Turn(user, answer, "remarks", phrasing_key(user), fact=answer)]


RECALL_NAME = (
    "[what is|what's|whats|tell me|say|do you know|do you remember|do you still know|can you tell me|"
    "remember|repeat] my name",
    "[who am i|how am i called|what am i called|what did i say my name was|what was my name|"
    "do you know who i am|do you remember me|do you remember who i am|and my name is|who is talking to you|"
    "so what is my name|what was my name again|what do you call me|my name|did you forget my name]",
)


def recall_name(rng: Random, name: str) -> Turn:
    user = say(rng, rng.choice(RECALL_NAME))
    return Turn(user, f"Your name is {name}.", "remember name", f"name {name}", fact=name)


def unknown_name(rng: Random) -> list[Turn]:
    user = say(rng, rng.choice(RECALL_NAME))
    return [Turn(user, "You have not told me your name yet.", "remember name", phrasing_key(user))]


def new_name(rng: Random) -> str:
    """A name that nobody has: two or three random syllables."""
    start = """b c d f g h j k l m n p r s t v w z br dr fr gr kl pl sh st th tr""".split()
    name = ""
    for _ in range(rng.randrange(2, 4)):
        name += rng.choice(start) + rng.choice("aeiou")
    if rng.random() < 0.5:
        name += rng.choice("lmnrstkx")
    return name.capitalize()


def user_system(rng: Random) -> str:
    """A system prompt of the ordinary kind, which changes nothing."""
    return (
        expand(
            rng,
            "[you are|be|act as|you're] a [helpful|kind|friendly|short-spoken|polite|brief|small|honest|"
            "patient|concise|useful|careful] [assistant|helper|model|bot|friend|ai|chatbot|teacher|guide]. "
            "[|answer briefly.|keep answers short.|be concise.|answer the question.|help the user.|"
            "be kind.|do not lie.|answer in one sentence.|think step by step.|use simple words.|"
            "if you do not know, say so.|answer truthfully and helpfully.|respond in english.]",
        )
        .strip()
        .capitalize()
    )


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "talk": (9.0, talk),
    "piece": (1.2, piece),
    "remark": (0.7, remark),
    "unknown_name": (0.4, unknown_name),
}
