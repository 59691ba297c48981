"""Where `context` fails: scores per kind of question, and looking up by the number of people."""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from random import Random

import torch

from recipes.tiny import corpus
from recipes.tiny.evaluate import Answerer, Question, messages_of, right
from recipes.tiny.grammar import held_out
from recipes.tiny.skills import context


def kinds(count: int, seed: int) -> list[Question]:
    """Held-out questions of `context`, named by the function that makes them."""
    rng, found = Random(f"probe {seed}"), []
    for name, (_, skill) in corpus.SKILLS.items():
        if {t.skill for t in skill(Random(0))} & {"context", "noted"} == set():
            continue
        mine: list[Question] = []
        for _ in range(count * 60):
            turns = skill(rng)
            if len(mine) < count and held_out(turns[-1].key) and turns[-1].skill == "context":
                mine.append(Question(messages_of(turns), turns[-1], name))
        found += mine
    return found


def by_people(count: int, seed: int) -> list[Question]:
    """Who has the ...? (back) and what does ... have? (ahead) among one to six people."""
    rng, found = Random(f"people {seed}"), []
    wanted = {
        f"{people} {way} {kind}": count
        for people in range(1, 7)
        for way in ("back", "ahead")
        for kind in ("held out", "trained")
    }
    while any(wanted.values()):
        people = rng.randrange(1, 7)
        turns = context.who_has(rng, people)
        last = turns[-1]
        way = "back" if last.answer.startswith("The ") else "ahead"
        name = f"{people} {way} {'held out' if held_out(last.key) else 'trained'}"
        if last.answer != context.UNKNOWN and wanted[name]:
            wanted[name] -= 1
            found.append(Question(messages_of(turns), last, name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("kvrun/tiny"))
    parser.add_argument("--count", type=int, default=80, help="questions per kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--wrong", type=int, default=0, help="show so many wrong answers per kind")
    args = parser.parse_args()
    answerer = Answerer(args.folder, getattr(torch, args.dtype))
    for questions in (kinds(args.count, args.seed), by_people(args.count, args.seed)):
        answerer.answer(questions, limit=40)
        by: dict[str, list[Question]] = defaultdict(list)
        for q in questions:
            by[q.skill].append(q)
        for name, part in sorted(by.items()):
            wrong = [q for q in part if not right(q)]
            print(f"{name:18} {1 - len(wrong) / len(part):.3f} of {len(part)}")
            for q in wrong[: args.wrong]:
                print(f"  {q.messages[-1]['content'][-140:]!r} -> {q.answer!r}")
                print(f"    wanted {q.turn.answer!r}")
        print(f"together {sum(map(right, questions)) / len(questions):.3f}", flush=True)


if __name__ == "__main__":
    main()
