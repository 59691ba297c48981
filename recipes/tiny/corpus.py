"""The training corpus: skills mixed into conversations, cut into shards of token ids."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from recipes.tiny import adapters, drills, longer
from recipes.tiny.grammar import Turn, held_out
from recipes.tiny.skills import (
    arithmetic,
    context,
    everyday,
    geography,
    house,
    lists,
    measures,
    memory,
    nature,
    ordering,
    outside,
    problems,
    stories,
    talk,
    things,
    wordplay,
)

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

Skill = Callable[[Random], list[Turn]]
Document = list[tuple[str, str]]  # (role, text)
GROUPS = (
    talk,
    arithmetic,
    ordering,
    problems,
    measures,
    geography,
    nature,
    things,
    everyday,
    wordplay,
    house,
    outside,
    lists,
    stories,
    context,
    memory,
)
SKILLS: dict[str, tuple[float, Skill]] = {k: v for g in GROUPS for k, v in g.SKILLS.items()}
NAMES = list(SKILLS)
FUNCTIONS = [SKILLS[n][1] for n in NAMES]
TOTALS: list[float] = []
for _name in NAMES:
    TOTALS.append(SKILLS[_name][0] + (TOTALS[-1] if TOTALS else 0.0))
ROW = 2048
NOT_TOLD = ("You have not told me your name yet.", context.UNKNOWN)
DRILLS = 0.06  # share of the documents
TOLD = ("Nice to meet you", context.NOTED[0])


def draw(rng: Random, skill: Skill, test: bool = False) -> list[Turn]:
    """Turns of one skill: none held out, or (test) with the last one held out."""
    while True:
        turns = skill(rng)
        if test:
            if held_out(turns[-1].key):
                return turns
        elif not any(held_out(t.key) for t in turns):
            return turns


def any_skill(rng: Random) -> list[Turn]:
    """Training turns of one skill, chosen by weight."""
    return draw(rng, rng.choices(FUNCTIONS, cum_weights=TOTALS)[0])


def conversation(rng: Random) -> Document:
    """A chat of one to ten exchanges over mixed topics."""
    roll = rng.random()
    if roll < 0.02:
        return longer.passkey(rng, lambda: any_skill(rng)[0].answer)
    if roll < 0.035:
        return [("", longer.raw(rng, lambda: any_skill(rng)[0].answer))]
    if roll < 0.07:
        return longer.governed(rng, lambda: any_skill(rng))
    if roll < 0.09:
        return longer.together(rng, lambda: any_skill(rng))
    if roll < 0.1:
        return longer.repeated(rng, lambda: any_skill(rng))
    if roll < 0.145:
        return longer.remembered(rng, lambda: any_skill(rng), draw)
    if roll < 0.145 + DRILLS:
        return drills.drill(rng)[0]
    document: Document = []
    if rng.random() < 0.15:
        document.append(("system", talk.user_system(rng)))
    length = rng.random()
    count = 1 if length < 0.45 else rng.randrange(2, 6) if length < 0.92 else rng.randrange(6, 11)
    again = rng.random() < 0.35
    skill = rng.choices(FUNCTIONS, cum_weights=TOTALS)[0]
    for _ in range(count):
        turns = draw(rng, skill) if again else any_skill(rng)
        if turns[0].answer in NOT_TOLD and any(text.startswith(TOLD) for _, text in document):
            continue
        document += [pair for t in turns for pair in (("user", t.user), ("assistant", t.answer))]
    return document or conversation(rng)


def rendered(document: Document) -> str:
    """The document as the chat template writes it."""
    if document[0][0] == "":
        return f"<|bos|>{document[0][1]}<|eos|>"
    return "<|bos|>" + "".join(f"<|{role}|>{text.strip()}<|end|>" for role, text in document)


TASKS: dict[str, Callable[[Random], Document]] = {"base": conversation}
for _task in adapters.TASKS:
    TASKS[_task] = adapters.documents(_task, draw, any_skill)


def texts(task: str, seed: int) -> Iterator[str]:
    """Endless rendered documents of a task, the same for the same seed."""
    rng = Random(f"{task} {seed}")
    make = TASKS[task]
    while True:
        yield rendered(make(rng))


def shard(task: str, seed: int, tokenizer: Tokenizer, rows: int, length: int = ROW) -> np.ndarray:
    """Token ids [rows, length]: whole documents one after another, padded with 0 at a row's end."""
    import numpy as np

    out = np.zeros((rows, length), dtype=np.uint16)
    row = used = 0
    stream = texts(task, seed)
    while row < rows:
        batch = [next(stream) for _ in range(512)]
        for encoded in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids = encoded.ids[:length]
            if used + len(ids) > length:
                row, used = row + 1, 0
                if row == rows:
                    break
            out[row, used : used + len(ids)] = ids
            used += len(ids)
    return out


def write_shards(
    task: str,
    folder: Path,
    first: int,
    step: int,
    count: int,
    rows: int,
    seed: int,
    length: int = ROW,
) -> None:
    """Write shards first, first + step, ... below count; each appears under its name when whole.

    `seed` is the seed of shard 0.
    """
    import numpy as np
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for index in range(first, count, step):
        part = folder / f"{task}-{index}.part.npy"
        np.save(part, shard(task, seed + index, tokenizer, rows, length))
        os.replace(part, folder / f"{task}-{index}.npy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="base", choices=list(TASKS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--jsonl", action="store_true", help="one JSON string per line")
    args = parser.parse_args()
    start, size = time.perf_counter(), 0
    for _, text in zip(range(args.documents), texts(args.task, args.seed), strict=False):
        size += len(text)
        print(json.dumps(text, ensure_ascii=False) if args.jsonl else text)
    seconds = time.perf_counter() - start
    if not args.jsonl:
        print(
            f"# {size / args.documents:.0f} characters a document, {size / seconds / 1e6:.2f} MB/s"
        )


if __name__ == "__main__":
    main()
