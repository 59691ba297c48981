"""The corpus generator: the same text for the same seed, held-out contents never in training."""

from __future__ import annotations

import ast
import operator
import re
from itertools import islice
from random import Random

import pytest

from recipes.tiny import corpus, drills, evaluate, jsonform, pirate, sql
from recipes.tiny.grammar import expand, held_out, parse
from recipes.tiny.skills import arithmetic, context, lists, ordering


def some(task: str, seed: int, count: int = 200) -> list[str]:
    return list(islice(corpus.texts(task, seed), count))


@pytest.mark.parametrize("task", list(corpus.TASKS))
def test_same_seed_same_text(task: str) -> None:
    assert some(task, 3) == some(task, 3)
    assert some(task, 3) != some(task, 4)


def test_training_never_draws_a_held_out_content() -> None:
    rng = Random(1)
    for _ in range(3000):
        assert not any(held_out(turn.key) for turn in corpus.any_skill(rng))


def test_about_a_tenth_of_the_sums_is_held_out_in_either_order() -> None:
    rng = Random(2)
    keys = {arithmetic.add(rng)[0].key for _ in range(4000)} - {""}
    share = sum(map(held_out, keys)) / len(keys)
    assert 0.07 < share < 0.13
    assert all(int(k.split()[1]) <= int(k.split()[2]) for k in keys)


def test_evaluation_asks_only_held_out_contents() -> None:
    questions = evaluate.base_questions(2, 5)
    assert len({q.skill for q in questions}) > 40
    assert all(held_out(q.turn.key) for q in questions)


OPERATORS = {"+": operator.add, "-": operator.sub, "x": operator.mul}


def test_answers_to_sums_are_right() -> None:
    rng = Random(3)
    for skill in (arithmetic.add, arithmetic.subtract, arithmetic.times):
        for _ in range(300):
            a, sign, b, result = re.fullmatch(
                r"(\d+) ([-+x]) (\d+) = (-?\d+)\.", skill(rng)[0].answer
            ).groups()  # type: ignore[union-attr]
            assert OPERATORS[sign](int(a), int(b)) == int(result)


def test_sorting_and_counting_letters_are_right() -> None:
    rng = Random(4)
    for _ in range(300):
        found = ast.literal_eval("[" + ordering.sort(rng)[0].answer[:-1] + "]")
        assert found in (sorted(found), sorted(found, reverse=True))
        (turn,) = lists.length(rng)
        assert turn.answer.endswith(f"{turn.fact}: {turn.fact} letters.")


def test_context_answers_come_from_the_text() -> None:
    rng = Random(5)
    for _ in range(300):
        turns = context.who_has(rng)
        said = " ".join(t.user for t in turns).lower()
        assert turns[-1].answer == context.UNKNOWN or turns[-1].fact.lower() in said


def test_every_sql_answer_runs() -> None:
    rng, db = Random(6), sql.database()
    for _ in range(300):
        assert sql.rows(db, sql.query(rng)[0].answer) is not None
    assert sql.rows(db, "DROP TABLE books") is None
    assert sql.rows(db, "SELECT nothing FROM nowhere") is None


def test_every_json_answer_has_the_keys_of_its_type() -> None:
    rng = Random(7)
    for _ in range(300):
        assert evaluate.parses(jsonform.record(rng)[0].answer)
    assert not evaluate.parses('{"type": "person"}')


def test_pirate_keeps_facts_and_style() -> None:
    rng = Random(8)
    for _ in range(300):
        turn = corpus.any_skill(rng)[0]
        spoken = pirate.spoken(turn).answer
        assert pirate.in_style(spoken)
        assert pirate.keeps(turn.fact, spoken)


def test_templates_expand_and_unbalanced_ones_are_refused() -> None:
    assert {expand(Random(i), "a[b|c[d|]]") for i in range(50)} == {"ab", "ac", "acd"}
    with pytest.raises(ValueError, match="unbalanced"):
        parse("a]b")


def test_loops_are_seen() -> None:
    line = "one two three four five six seven eight "
    assert evaluate.loops(line * 2)
    assert not evaluate.loops(line)


def test_drills_ask_half_of_their_facts_and_never_name_a_held_out_person() -> None:
    rng = Random(9)
    for _ in range(300):
        document, facts = drills.drill(rng)
        text = corpus.rendered(document)
        told, answers = document[0][1].lower(), [t for role, t in document if role == "assistant"]
        assert all(f.value.lower() in told and f.owner.lower() in told for f in facts)
        for f in facts:
            assert not held_out(f"ctx {f.owner}" + f" {f.value}" * f.owner.islower())
        forms = [(f.ahead[1], f.back[1], f"{f.value}: {f.owner}") for f in facts]
        asked = [form for form in forms if any(x in a for x in form for a in answers)]
        assert 0 < len(asked) <= (len(facts) + 1) // 2
        assert text.startswith("<|bos|>")
        assert text.endswith("<|end|>")


def test_no_held_out_name_stands_beside_a_name_of_the_training_kind() -> None:
    rng = Random(10)
    for _ in range(300):
        names = context.people(rng, 4, 2)
        assert len(set(names)) == 4
        assert held_out(f"ctx {names[2]}") or not any(held_out(f"ctx {n}") for n in names)
