"""Questions about five tables and the SELECT that answers each; rows to run them on."""
# ruff: noqa: E501, SIM905 (templates and word lists read best on one line)

from __future__ import annotations

import sqlite3
from random import Random

from recipes.tiny.grammar import Turn, say
from recipes.tiny.skills.talk import NAMES, new_name

SCHEMA = {
    "customers": ("id", "name", "city", "age"),
    "products": ("id", "name", "category", "price"),
    "orders": ("id", "customer_id", "product_id", "quantity", "year"),
    "employees": ("id", "name", "job", "city", "salary"),
    "books": ("id", "title", "author", "year", "pages"),
}
SYSTEM = "Answer with one SQL query. Tables: " + "; ".join(
    f"{table}({', '.join(columns)})" for table, columns in SCHEMA.items()
)
CITIES = (
    """Paris London Rome Berlin Madrid Oslo Vienna Lisbon Dublin Athens Prague Warsaw""".split()
)
CATEGORIES = ["toys", "food", "clothes", "tools", "garden", "music", "sport", "kitchen"]
JOBS = """baker teacher doctor pilot farmer cook painter driver nurse clerk""".split()
GOODS = (
    """lamp chair table ball guitar shirt hammer spade pan drum bread cheese coat kite""".split()
)
TITLES = [
    "Night",
    "Rain",
    "The Sea",
    "Home",
    "Stars",
    "The Road",
    "Winter",
    "A Day",
    "Birds",
    "Salt",
    "The Door",
    "Blue",
]
TEXTS = {
    ("customers", "city"): CITIES,
    ("customers", "name"): NAMES,
    ("products", "category"): CATEGORIES,
    ("products", "name"): GOODS,
    ("employees", "job"): JOBS,
    ("employees", "city"): CITIES,
    ("employees", "name"): NAMES,
    ("books", "author"): NAMES,
    ("books", "title"): TITLES,
}
NUMBERS = {
    ("customers", "age"): (18, 90),
    ("products", "price"): (1, 500),
    ("orders", "quantity"): (1, 30),
    ("orders", "year"): (2015, 2026),
    ("employees", "salary"): (1000, 9000),
    ("books", "year"): (1950, 2025),
    ("books", "pages"): (50, 900),
}
LABEL = {
    "customers": "name",
    "products": "name",
    "employees": "name",
    "books": "title",
    "orders": "id",
}
SHOW = (
    "[show|list|give me|find|get|select|which are|what are|i want|return|tell me|show me|display]"
)
MORE = {
    "age": ("older than", "younger than"),
    "price": (
        "[that cost more than|more expensive than|costing more than]",
        "[that cost less than|cheaper than|costing less than]",
    ),
    "quantity": ("[with a quantity over|of more than]", "[with a quantity below|of less than]"),
    "year": ("[from after|after|later than]", "[from before|before|earlier than]"),
    "salary": (
        "[that earn more than|earning more than|with a salary over]",
        "[that earn less than|earning less than|with a salary below]",
    ),
    "pages": ("with more than", "with fewer than"),
}
Made = tuple[str, str, dict[str, object], str]  # template, query, fields, key


def _number(rng: Random, table: str) -> tuple[str, int]:
    column = rng.choice([c for t, c in NUMBERS if t == table])
    low, high = NUMBERS[table, column]
    value = rng.randrange(low, high)
    if column == "salary":
        value -= value % 100
    return column, value


def _text(rng: Random, table: str) -> tuple[str, str]:
    column = rng.choice([c for t, c in TEXTS if t == table])
    value = rng.choice(TEXTS[table, column])
    if column in ("name", "author") and rng.random() < 0.3:
        value = new_name(rng)
    return column, value


def _where_number(rng: Random, table: str) -> tuple[str, str, dict[str, object], str]:
    column, value = _number(rng, table)
    over = rng.random() < 0.5
    words = MORE[column][0 if over else 1] + " {n}" + (" pages" if column == "pages" else "")
    return words, f"{column} {'>' if over else '<'} {value}", {"n": value}, f"{column} {value}"


def _where_text(rng: Random, table: str) -> tuple[str, str, dict[str, object], str]:
    column, value = _text(rng, table)
    words = {
        "city": "[from|in|who live in|living in] {=v}",
        "category": "[in the category {=v}|of the category {=v}|in {=v}]",
        "job": "[who work as {=v}|with the job {=v}|whose job is {=v}]",
        "name": "[named|called|with the name] {=v}",
        "author": "[by|written by|of the author] {=v}",
        "title": "[called|with the title|titled] {=v}",
    }[column]
    return words, f"{column} = '{value}'", {"v": value}, f"{column} {value}"


def _where(rng: Random, table: str) -> tuple[str, str, dict[str, object], str]:
    if table == "orders" or rng.random() < 0.5:
        return _where_number(rng, table)
    return _where_text(rng, table)


def _list(rng: Random) -> Made:
    table = rng.choice(list(SCHEMA))
    words, where, fields, key = _where(rng, table)
    column = rng.choice([c for c in SCHEMA[table] if c != "id" and not c.endswith("_id")])
    if rng.random() < 0.35:
        ask = SHOW + f" [all|the|all the|] {table} " + words
        return ask, f"SELECT * FROM {table} WHERE {where};", fields, f"list * {key}"
    ask = SHOW + f" the {column}[s|] of [all|the|] {table} " + words
    if column == LABEL[table] and rng.random() < 0.3:
        ask = f"[which|what] {table} [are|do we have] " + words
    return ask, f"SELECT {column} FROM {table} WHERE {where};", fields, f"list {column} {key}"


def _all(rng: Random) -> Made:
    table = rng.choice(list(SCHEMA))
    if rng.random() < 0.4:
        return SHOW + f" [all|all the|every one of the] {table}", f"SELECT * FROM {table};", {}, ""
    column = rng.choice([c for c in SCHEMA[table] if c != "id" and not c.endswith("_id")])
    if rng.random() < 0.4:
        ask = f"[{SHOW} the different|{SHOW} all different|which different] {column}s of [the |]{table}"
        return ask, f"SELECT DISTINCT {column} FROM {table};", {}, ""
    return SHOW + f" the {column}s of all {table}", f"SELECT {column} FROM {table};", {}, ""


def _count(rng: Random) -> Made:
    table = rng.choice(list(SCHEMA))
    if rng.random() < 0.2:
        ask = f"[how many {table} are there|how many {table} do we have|count the {table}|count all {table}|number of {table}]"
        return ask, f"SELECT COUNT(*) FROM {table};", {}, ""
    words, where, fields, key = _where(rng, table)
    ask = (
        f"[how many {table} are there|how many {table} do we have|count the {table}|number of {table}|what is the number of {table}] "
        + words
    )
    return ask, f"SELECT COUNT(*) FROM {table} WHERE {where};", fields, f"count {key}"


AGGREGATES = {
    "AVG": "[average|mean]",
    "MAX": "[highest|maximum|largest|greatest]",
    "MIN": "[lowest|minimum|smallest]",
    "SUM": "[total|sum of the]",
}


def _aggregate(rng: Random) -> Made:
    table, column = rng.choice(list(NUMBERS))
    kinds = [k for k in AGGREGATES if not (k in ("SUM", "AVG") and column == "year")]
    kind = rng.choice(kinds)
    start = "[what is|what's|show me|give me|tell me|find|compute] the "
    ask = start + AGGREGATES[kind] + f" {column} of [all |the |]{table}"
    if rng.random() < 0.35:
        return ask, f"SELECT {kind}({column}) FROM {table};", {}, ""
    words, where, fields, key = _where(rng, table)
    return (
        ask + " " + words,
        f"SELECT {kind}({column}) FROM {table} WHERE {where};",
        fields,
        f"{kind} {column} {key}",
    )


def _order(rng: Random) -> Made:
    table, column = rng.choice(list(NUMBERS))
    down = rng.random() < 0.6
    direction = " DESC" if down else ""
    label = LABEL[table]
    if rng.random() < 0.4:
        way = (
            "[from high to low|in descending order|descending|highest first]"
            if down
            else "[from low to high|in ascending order|ascending|lowest first|]"
        )
        ask = SHOW + f" [all|the] {table} [sorted|ordered] by {column} " + way
        return ask, f"SELECT * FROM {table} ORDER BY {column}{direction};", {}, ""
    n = rng.randrange(1, 21)
    word = "[highest|largest]" if down else "[lowest|smallest]"
    if n == 1 or rng.random() < 0.2:
        ask = f"[which|what|show the|find the|get the] {table.removesuffix('s')} [with|has] the {word} {column}"
        return ask, f"SELECT {label} FROM {table} ORDER BY {column}{direction} LIMIT 1;", {}, ""
    ask = SHOW + f" the {{n}} {table} with the {word} {column}"
    query = f"SELECT {label} FROM {table} ORDER BY {column}{direction} LIMIT {n};"
    return ask, query, {"n": n}, f"top {table} {column} {n}"


def _group(rng: Random) -> Made:
    table, column = rng.choice(
        [
            ("customers", "city"),
            ("products", "category"),
            ("employees", "job"),
            ("employees", "city"),
            ("books", "author"),
            ("books", "year"),
            ("orders", "year"),
        ]
    )
    if rng.random() < 0.5:
        ask = f"[how many {table} are there|count the {table}|number of {table}|count of {table}] [per|for each|in each|by] {column}"
        if column == "author":
            ask = f"[how many {table} are there|count the {table}|number of {table}] [per|for each|by each] {column}"
        return ask, f"SELECT {column}, COUNT(*) FROM {table} GROUP BY {column};", {}, ""
    number = rng.choice([c for t, c in NUMBERS if t == table and c != "year"])
    kind = rng.choice(("AVG", "MAX", "MIN", "SUM"))
    ask = (
        "[what is|show me|give me|tell me|find] the "
        + AGGREGATES[kind]
        + f" {number} of {table} [per|for each|by] {column}"
    )
    return ask, f"SELECT {column}, {kind}({number}) FROM {table} GROUP BY {column};", {}, ""


def _both(rng: Random) -> Made:
    table = rng.choice(("customers", "products", "employees", "books"))
    words, where, fields, key = _where_text(rng, table)
    more, also, numbers, other = _where_number(rng, table)
    column = rng.choice(("*", LABEL[table]))
    ask = (
        SHOW
        + (f" [all |the |]{table} " if column == "*" else f" the {column}s of {table} ")
        + f"{words} [and|that are also|and also] {more}"
    )
    return (
        ask,
        f"SELECT {column} FROM {table} WHERE {where} AND {also};",
        {**fields, **numbers},
        f"both {key} {other}",
    )


def _join(rng: Random) -> Made:
    kind = rng.randrange(4)
    name = rng.choice(NAMES) if rng.random() < 0.7 else new_name(rng)
    good = rng.choice(GOODS)
    if kind == 0:
        ask = "[which products did {=v} buy|what did {=v} order|what did {=v} buy|show the products {=v} ordered]"
        query = (
            "SELECT products.name FROM orders JOIN customers ON orders.customer_id = customers.id "
            f"JOIN products ON orders.product_id = products.id WHERE customers.name = '{name}';"
        )
        return ask, query, {"v": name}, f"join 0 {name}"
    if kind == 1:
        ask = (
            "[who bought|which customers bought|who ordered|which customers ordered] [a |the |]{=v}"
        )
        query = (
            "SELECT customers.name FROM orders JOIN customers ON orders.customer_id = customers.id "
            f"JOIN products ON orders.product_id = products.id WHERE products.name = '{good}';"
        )
        return ask, query, {"v": good}, f"join 1 {good}" if good not in GOODS[:4] else ""
    if kind == 2:
        ask = "[how many orders did {=v} make|how many orders does {=v} have|count the orders of {=v}|how often did {=v} order]"
        query = (
            "SELECT COUNT(*) FROM orders JOIN customers ON orders.customer_id = customers.id "
            f"WHERE customers.name = '{name}';"
        )
        return ask, query, {"v": name}, f"join 2 {name}"
    city = rng.choice(CITIES)
    ask = "[show|list|find] [the |all |]orders of customers [from|in|living in] {=v}"
    query = (
        "SELECT orders.id FROM orders JOIN customers ON orders.customer_id = customers.id "
        f"WHERE customers.city = '{city}';"
    )
    return ask, query, {"v": city}, f"join 3 {city}"


KINDS = (_list, _list, _list, _all, _count, _count, _aggregate, _order, _group, _both, _join)


def query(rng: Random) -> list[Turn]:
    """A question about the tables and its one SELECT."""
    template, text, fields, key = rng.choice(KINDS)(rng)
    user = say(rng, template, rng.choice("?."), wrap=rng.random() < 0.3, **fields)
    return [Turn(user, text, "sql", f"sql {key}" if key else "", fact=text)]


def database() -> sqlite3.Connection:
    """The five tables in memory with rows that tell different queries apart."""
    rng = Random("database")
    db = sqlite3.connect(":memory:")
    for table, columns in SCHEMA.items():
        db.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
        for row in range(1, 301):
            values: list[object] = []
            for column in columns:
                if column == "id":
                    values.append(row)
                elif column.endswith("_id"):
                    values.append(rng.randrange(1, 301))
                elif (table, column) in TEXTS:
                    values.append(rng.choice(TEXTS[table, column]))
                else:
                    low, high = NUMBERS[table, column]
                    value = rng.randrange(low, high)
                    values.append(value - value % 100 if column == "salary" else value)
            db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(values))})", values)
    return db


def rows(db: sqlite3.Connection, text: str) -> list[tuple[object, ...]] | None:
    """The sorted rows of a SELECT, or None when it is no valid SELECT."""
    if not text.lstrip().upper().startswith("SELECT"):
        return None
    try:
        found = db.execute(text).fetchall()
    except (sqlite3.Error, sqlite3.Warning):
        return None
    return found if "ORDER BY" in text.upper() else sorted(found, key=repr)
