"""Units, temperatures, the clock, weekdays and dates."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

from collections.abc import Callable
from random import Random

from recipes.tiny.grammar import Turn, ask, phrasing_key, say

# (large unit, its typed forms, small unit, its typed forms, how many small in one large)
UNITS = (
    ("kilometres", "[kilometres|kilometers|km|kms]", "metres", "[metres|meters|m]", 1000),
    ("metres", "[metres|meters|m]", "centimetres", "[centimetres|centimeters|cm]", 100),
    (
        "centimetres",
        "[centimetres|centimeters|cm]",
        "millimetres",
        "[millimetres|millimeters|mm]",
        10,
    ),
    ("kilograms", "[kilograms|kilos|kg|kgs]", "grams", "[grams|g|gram]", 1000),
    ("tonnes", "[tonnes|tons|t]", "kilograms", "[kilograms|kilos|kg]", 1000),
    ("grams", "[grams|g]", "milligrams", "[milligrams|mg]", 1000),
    ("litres", "[litres|liters|l]", "millilitres", "[millilitres|milliliters|ml]", 1000),
    ("hours", "[hours|h|hrs]", "minutes", "[minutes|min|mins]", 60),
    ("minutes", "[minutes|min|mins]", "seconds", "[seconds|sec|secs|s]", 60),
    ("days", "days", "hours", "[hours|h|hrs]", 24),
    ("weeks", "weeks", "days", "days", 7),
    ("years", "years", "months", "months", 12),
    ("feet", "[feet|ft]", "inches", "[inches|in]", 12),
    ("yards", "[yards|yd]", "feet", "[feet|ft]", 3),
    ("dollars", "dollars", "cents", "cents", 100),
    ("euros", "euros", "cents", "cents", 100),
    ("dozens", "[dozen|dozens]", "pieces", "[pieces|things]", 12),
    ("centuries", "centuries", "years", "years", 100),
    ("decades", "decades", "years", "years", 10),
    ("kilobytes", "[kilobytes|kb]", "bytes", "bytes", 1000),
)
ONE = {"feet": "foot", "inches": "inch", "centuries": "century"}
CONVERT = (
    "{=n} {a} [in|to|into|in to] {b}",
    "[convert|change|turn] {=n} {a} [to|into|in] {b}",
    "how many {b} [are|is|are there in|in|make|are in] {=n} {a}",
    "how many {b} are {=n} {a}",
    "what is {=n} {a} in {b}",
    "[how much is|what are|what's] {=n} {a} [in|as] {b}",
    "{=n} {a} is how many {b}",
    "{=n} {a} = [? |]{b}",
)


def shown(value: float) -> str:
    """A number with at most two decimals and no useless zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def counted(value: float, unit: str) -> str:
    """`1 metre`, `2.5 metres`."""
    return f"{shown(value)} {ONE.get(unit, unit[:-1]) if value == 1 else unit}"


def units(rng: Random) -> list[Turn]:
    large, large_typed, small, small_typed, factor = rng.choice(UNITS)
    if rng.random() < 0.6:
        n: float = rng.randrange(1, 13) if rng.random() < 0.4 else rng.randrange(1, 500)
        if factor in (10, 100, 1000) and rng.random() < 0.25:
            n = rng.randrange(1, 500) / 10
        if factor in (60, 24, 7, 12, 3) and n > 60:
            n = rng.randrange(1, 61)
        n = n % 14 + 1 if factor == 24 else n
        first, second, result = large, small, n * factor
        typed = (large_typed, small_typed)
    else:
        result = rng.randrange(1, 61)
        if factor in (10, 100, 1000) and rng.random() < 0.4:
            result = rng.randrange(1, 500) / 10
        result = result % 14 + 1 if factor == 24 else result
        n = result * factor
        first, second = small, large
        typed = (small_typed, large_typed)
    frame = rng.choice(CONVERT).replace("{a}", typed[0]).replace("{b}", typed[1])
    if n == 1 and large in ("hours", "minutes", "days", "weeks", "years", "centuries", "decades"):
        return units(rng)
    if n == 1 and rng.random() < 0.7:
        name = ONE.get(first, first[:-1])
        one = "an" if name == "hour" else "a"
        frame = frame.replace("{=n} " + typed[0], rng.choice((f"{one} {name}", f"one {name}")))
    user = say(rng, frame, n=shown(n))
    answer = f"{counted(n, first)} {'is' if n == 1 else 'are'} {counted(result, second)}."
    key = "" if n <= 12 else f"unit {n} {first} {second}"
    # Days are few enough to be learnt by heart: held out by their wording.
    key = phrasing_key(user) if factor == 24 else key
    return [Turn(user, answer, "units", key, fact=shown(result))]


FOREIGN = (
    ("miles", "[miles|mi|mile]", "kilometres", "[kilometres|kilometers|km]", 1.6),
    ("inches", "[inches|inch|in]", "centimetres", "[centimetres|centimeters|cm]", 2.54),
    ("pounds", "[pounds|lbs|lb]", "kilograms", "[kilograms|kg|kilos]", 0.45),
)


def foreign_units(rng: Random) -> list[Turn]:
    first, typed, second, into, factor = rng.choice(FOREIGN)
    n = rng.randrange(1, 101)
    frame = rng.choice(CONVERT).replace("{a}", typed).replace("{b}", into)
    user = say(rng, frame, n=n)
    answer = f"{counted(n, first)} {'is' if n == 1 else 'are'} about {counted(n * factor, second)}."
    # A table of 300 facts, learnt by heart: held out by its wording.
    return [Turn(user, answer, "foreign units", phrasing_key(user), shown(n * factor))]


def temperature(rng: Random) -> list[Turn]:
    celsius = rng.randrange(-40, 301)
    if rng.random() < 0.5:
        celsius = rng.choice((0, 5, 10, 15, 20, 25, 30, 35, 37, 40, 50, 60, 80, 90, 100, 180, 200))
    c = "[degrees celsius|celsius|c|degrees c|°c]"
    f = "[fahrenheit|f|degrees fahrenheit|°f]"
    if rng.random() < 0.6:
        frame = rng.choice(CONVERT[:2] + CONVERT[4:6]).replace("{a}", c).replace("{b}", f)
        user = say(rng, frame, n=celsius)
        result = celsius * 9 / 5 + 32
        answer = f"{celsius} degrees Celsius are {shown(round(result, 1))} degrees Fahrenheit."
    else:
        celsius -= celsius % 5 if rng.random() < 0.85 else 0
        fahrenheit = celsius * 9 // 5 + 32
        frame = rng.choice(CONVERT[:2] + CONVERT[4:6]).replace("{a}", f).replace("{b}", c)
        user = say(rng, frame, n=fahrenheit)
        result = (fahrenheit - 32) * 5 / 9
        answer = f"{fahrenheit} degrees Fahrenheit are {shown(round(result, 1))} degrees Celsius."
    if celsius == 1:
        return temperature(rng)
    return [Turn(user, answer, "temperature", f"temp {answer}", fact=shown(round(result, 1)))]


def _clock(minutes: int, style: int) -> str:
    minutes %= 1440
    hour, minute = divmod(minutes, 60)
    if style == 0:
        return f"{hour}:{minute:02d}"
    half = "am" if hour < 12 else "pm"
    hour = (hour + 11) % 12 + 1
    return f"{hour}:{minute:02d} {half}" if minute else f"{hour} {half}"


CLOCK_ON = (
    "what time is it [{n} {u}|{n} {u}] after {=t}",
    "[what is|what's|tell me|give me] {=t} plus {n} {u}",
    "{=t} plus {n} {u}",
    "{=t} + {n} {u}",
    "what time is {n} {u} after {=t}",
    "it is {=t}[.|,|. ] what time [is it|will it be] in {n} {u}",
    "[if|when] it is {=t} [now|], what time is it in {n} {u}",
    "add {n} {u} to {=t}",
    "it's {=t} now. what time will it be {n} {u} later",
)
CLOCK_BACK = (
    "what time is it {n} {u} before {=t}",
    "{=t} minus {n} {u}",
    "what time is {n} {u} before {=t}",
    "it is {=t}. what time was it {n} {u} ago",
)


def clock(rng: Random) -> list[Turn]:
    style = rng.randrange(2)
    start = rng.randrange(24) * 60 + rng.choice((0, 0, 0, 15, 30, 45, rng.randrange(60)))
    if rng.random() < 0.5:
        n, unit, step = rng.randrange(1, 13), "[hours|h]", 60
    else:
        n, unit, step = rng.choice((5, 10, 15, 20, 25, 30, 40, 45, 50, 60, 90)), "[minutes|min]", 1
    back = rng.random() < 0.3
    end = start - n * step if back else start + n * step
    frame = rng.choice(CLOCK_BACK if back else CLOCK_ON).replace("{u}", unit)
    if n == 1:
        frame = frame.replace(unit, "hour")
    user = say(rng, frame, t=_clock(start, style), n=n)
    word = ("hour" if n == 1 else "hours") if step == 60 else "minutes"
    side = "before" if back else "after"
    answer = f"{n} {word} {side} {_clock(start, style)} is {_clock(end, style)}."
    return [Turn(user, answer, "clock", f"clock {start} {n} {step} {back}", _clock(end, style))]


def duration(rng: Random) -> list[Turn]:
    start = rng.randrange(24) * 60 + rng.choice((0, 15, 30, 45))
    length = rng.randrange(1, 48) * 15
    if start + length >= 1440:
        start = 1439 - length - (1439 - length) % 15
    style = 0 if rng.random() < 0.6 else 1
    a, b = _clock(start, style), _clock(start + length, style)
    own = (
        "how long is it from {=a} to {=b}",
        "how [long|many hours|much time] is [there |]between {=a} and {=b}",
        "[how much time is it|time] from {=a} to {=b}",
        "how many hours [are there |]from {=a} to {=b}",
    )
    user = say(rng, rng.choice(own), a=a, b=b)
    hours, minutes = divmod(length, 60)
    parts = []
    if hours:
        parts.append(f"{hours} hour" + ("s" if hours > 1 else ""))
    if minutes:
        parts.append(f"{minutes} minutes")
    answer = f"From {a} to {b} it is {' and '.join(parts)}."
    return [Turn(user, answer, "clock", f"duration {start} {length}", fact=" and ".join(parts))]


DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = """January February March April May June July August September October November December""".split()
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
ORDINALS = (
    """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth""".split()
)


def weekday(rng: Random) -> list[Turn]:
    day = rng.randrange(7)
    kind = rng.randrange(5)
    name = DAYS[day]
    if kind < 2:
        n = 1 if kind == 0 else -1
        where = "after" if n > 0 else "before"
        own = (
            "[what|which] day [comes|is] [right |]" + where + " {d}",
            "what [comes|is] [right |]" + where + " {d}",
            "the day " + where + " {d}",
        )
        user = say(rng, rng.choice(own), d=name)
        found = DAYS[(day + n) % 7]
        answer = f"{found} comes {where} {name}."
    elif kind == 2:
        own = (
            "[if |]today is {d}[,|.] what [day |]is [it |]tomorrow",
            "today is {d}[,|.] [what|which] day is [it |]tomorrow",
        )
        user = say(rng, rng.choice(own), d=name)
        found = DAYS[(day + 1) % 7]
        answer = f"If today is {name}, tomorrow is {found}."
    elif kind == 3:
        own = (
            "[if |]today is {d}[,|.] what [day |]was [it |]yesterday",
            "today is {d}[,|.] [what|which] day was [it |]yesterday",
        )
        user = say(rng, rng.choice(own), d=name)
        found = DAYS[(day - 1) % 7]
        answer = f"If today is {name}, yesterday was {found}."
    else:
        n = rng.randrange(2, 15)
        own = (
            "[what|which] day is [it |]{n} days after {d}",
            "[if |]today is {d}[,|.] what day is it in {n} days",
            "{d} plus {n} days",
        )
        user = say(rng, rng.choice(own), d=name, n=n)
        found = DAYS[(day + n) % 7]
        answer = f"{n} days after {name} is {found}."
    return [Turn(user, answer, "dates", phrasing_key(user), fact=found)]


def month(rng: Random) -> list[Turn]:
    at = rng.randrange(12)
    kind = rng.randrange(5)
    name = MONTHS[at]
    if kind < 2:
        n = 1 if kind == 0 else -1
        where = "after" if n > 0 else "before"
        user = say(rng, "[what|which|what month|which month] [comes|is] " + where + " {m}", m=name)
        fact = MONTHS[(at + n) % 12]
        answer = f"{fact} comes {where} {name}."
    elif kind == 2:
        own = (
            "how many days [does {m} have|are there in {m}|has {m}|are in {m}|in {m}]",
            "how long is {m}",
            "days in {m}",
        )
        user = say(rng, rng.choice(own), m=name)
        fact = str(LENGTHS[at])
        answer = f"{name} has {fact} days" + (", 29 in a leap year." if at == 1 else ".")
    elif kind == 3:
        user = say(rng, "[what|which] [number |]month is {m}", m=name)
        fact = ORDINALS[at]
        answer = f"{name} is the {fact} month."
    else:
        word = ORDINALS[at] if at else "first"
        user = ask(rng, "the {o} month [of the year|]", ("[what|which] month is the {o}",), o=word)
        fact = name
        answer = f"The {word} month is {name}."
    return [Turn(user, answer, "dates", phrasing_key(user), fact=fact)]


def date(rng: Random) -> list[Turn]:
    at = rng.randrange(12)
    day, n = rng.randrange(1, LENGTHS[at] + 1), rng.randrange(1, 31)
    if rng.random() < 0.7:
        n = rng.randrange(1, 11)
    later, month_at = day + n, at
    while later > LENGTHS[month_at]:
        later -= LENGTHS[month_at]
        month_at = (month_at + 1) % 12
    own = (
        "[what|which] date is [it |]{n} days after {=d}",
        "{=d} plus {n} days",
        "what date is {n} days after {=d}",
        "[if |]today is {=d}[,|.] what is the date in {n} days",
    )
    typed = rng.choice((f"{day} {MONTHS[at]}", f"{MONTHS[at]} {day}"))
    if n == 1:
        own = tuple(frame.replace("{n} days", "[one|1] day") for frame in own)
    user = say(rng, rng.choice(own), d=typed, n=n)
    fact = f"{later} {MONTHS[month_at]}"
    answer = f"{n} day{'s' if n > 1 else ''} after {day} {MONTHS[at]} is {fact}."
    return [Turn(user, answer, "dates", f"date {day} {at} {n}", fact=fact)]


SKILLS: dict[str, tuple[float, Callable[[Random], list[Turn]]]] = {
    "units": (3.0, units),
    "foreign": (0.6, foreign_units),
    "temperature": (4.4, temperature),
    "clock": (2.0, clock),
    "duration": (0.8, duration),
    "weekday": (0.8, weekday),
    "month": (0.8, month),
    "date": (0.8, date),
}
