"""Sentences about people, orders and events, and the JSON object with fixed keys for each."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

import json
from random import Random

from recipes.tiny.grammar import Turn, expand, say
from recipes.tiny.skills.context import TOWNS
from recipes.tiny.skills.measures import DAYS
from recipes.tiny.skills.talk import NAMES, new_name

SYSTEM = "Turn the sentence into JSON."
KEYS = {
    "person": ("type", "name", "age", "city", "job"),
    "order": ("type", "customer", "item", "quantity", "price"),
    "event": ("type", "title", "day", "time", "place"),
}
JOBS = """baker teacher doctor pilot farmer cook painter sailor dentist tailor nurse driver clerk""".split()
ITEMS = """lamp chair table ball guitar shirt hammer spade pan drum cheese coat kite book pen apple
cake""".split()
TITLES = (
    """concert meeting party lunch dinner match lesson picnic workshop talk exam wedding""".split()
)
SPOTS = [
    "park",
    "library",
    "school",
    "museum",
    "garden",
    "office",
    "town hall",
    "kitchen",
    "harbour",
    "station",
    "theatre",
]


def _name(rng: Random) -> str:
    return rng.choice(NAMES) if rng.random() < 0.5 else new_name(rng)


def _person(rng: Random) -> tuple[str, dict[str, object], str]:
    name, age = _name(rng), rng.randrange(3, 99)
    city = rng.choice(TOWNS) if rng.random() < 0.6 else new_name(rng)
    job = rng.choice(JOBS)
    has = [rng.random() < 0.8 for _ in range(3)]
    record: dict[str, object] = {
        "type": "person",
        "name": name,
        "age": age if has[0] else None,
        "city": city if has[1] else None,
        "job": job if has[2] else None,
    }
    roll = rng.random()
    parts = []
    if roll < 0.5:
        if has[0]:
            parts.append(expand(rng, f"[is {age} years old|is {age}]"))
        if has[1]:
            parts.append(expand(rng, f"[lives in|comes from|is from] {city}"))
        if has[2]:
            parts.append(expand(rng, f"[works as a|is a] {job}"))
        rng.shuffle(parts)
        text = f"{name} " + (
            " and ".join([", ".join(parts[:-1]), parts[-1]]) if len(parts) > 1 else "".join(parts)
        )
        if not parts:
            text = f"this is {name}"
    else:
        text = f"{name}" + (f", {age}," if has[0] else "")
        text += f" [is a|works as a] {job}" if has[2] else " is a person"
        text += f" [in|from] {city}" if has[1] else ""
        text = expand(rng, text)
    return text, record, f"{name} {age if has[0] else ''}"


def _order(rng: Random) -> tuple[str, dict[str, object], str]:
    name, item = _name(rng), rng.choice(ITEMS)
    n, price = rng.randrange(1, 50), rng.randrange(1, 300)
    priced = rng.random() < 0.7
    goods = item if n == 1 else item + "s" if item != "cheese" else "cheeses"
    count = ("a" if item[0] not in "aeiou" else "an") if n == 1 and rng.random() < 0.5 else str(n)
    record: dict[str, object] = {
        "type": "order",
        "customer": name,
        "item": item,
        "quantity": n,
        "price": price if priced else None,
    }
    form = rng.choice(
        (
            f"{name} [orders|buys|bought|ordered|wants|needs|would like] {count} {goods}",
            f"{count} {goods} for {name}",
            f"[order|please order|send] {count} {goods} [for|to] {name}",
            f"[new order|order]: {count} {goods}, customer {name}",
        )
    )
    if priced:
        form += f" [for|at|, price] {price} [euros|dollars|]"
    return " ".join(expand(rng, form).replace(" ,", ",").split()), record, f"{name} {item} {n}"


def _event(rng: Random) -> tuple[str, dict[str, object], str]:
    title, day, place = rng.choice(TITLES), rng.choice(DAYS), rng.choice(SPOTS)
    clock = f"{rng.randrange(6, 24)}:{rng.choice(('00', '15', '30', '45'))}"
    timed, placed = rng.random() < 0.75, rng.random() < 0.75
    record: dict[str, object] = {
        "type": "event",
        "title": title,
        "day": day,
        "time": clock if timed else None,
        "place": place if placed else None,
    }
    when = (
        [f"on {day}"]
        + ([f"at {clock}"] if timed else [])
        + ([f"{'at' if place == 'station' else 'in'} the {place}"] if placed else [])
    )
    rng.shuffle(when)
    form = rng.choice(
        (
            f"[there is a|we have a|the|a|don't forget the] {title} "
            + ("[is |]" if rng.random() < 0.3 else "")
            + " ".join(when),
            f"{title}[:|] " + rng.choice((", ", " ")).join(when),
            f"[come to the|invite them to the|i go to the] {title} " + " ".join(when),
            f"{when[0]} there is a {title} " + " ".join(when[1:]),
        )
    )
    return " ".join(expand(rng, form).split()), record, f"{title} {day} {clock if timed else ''}"


def record(rng: Random) -> list[Turn]:
    """A sentence and its JSON object."""
    text, found, key = rng.choice((_person, _order, _event))(rng)
    if rng.random() < 0.25:
        text = (
            expand(rng, "[json|make json|as json|to json|turn this into json|json please]: ") + text
        )
    user = text[0].upper() + text[1:] if rng.random() < 0.6 else text
    user += "." if rng.random() < 0.6 else ""
    user = user if "{" in user else say(rng, "{=t}", "", wrap=False, t=user)
    answer = json.dumps(found, ensure_ascii=False)
    return [Turn(user, answer, "json", f"json {key}", fact=answer)]
