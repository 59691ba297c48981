"""Greedy answers on held-out questions with plain transformers, per skill, and eval.json."""

from __future__ import annotations

import argparse
import json
import re
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from recipes.tiny import adapters, corpus, jsonform, longer, pirate, sql
from recipes.tiny.grammar import Turn, held_out
from recipes.tiny.skills import context

VERSION = 1
END = 7
GATES = {
    "add": 0.97, "subtract": 0.97, "times": 0.99, "sort": 0.95, "count letters": 0.90,
    "units": 0.90,
    "temperature": 0.90, "clock": 0.90, "dates": 0.90, "capitals": 0.98, "continents": 0.98,
    "currencies": 0.98, "colours": 0.98, "elements": 0.98, "planets": 0.98, "lists": 0.95,
    "letters": 0.95, "stories": 0.95, "kvrun": 0.97, "context": 0.93, "remember name": 0.93,
    "talk": 0.98, "outside": 0.95, "stop": 0.95, "passkey 1.5k": 0.95, "sql": 0.92, "json": 0.93,
    "json parses": 1.0, "pirate style": 0.95, "pirate facts": 0.90,
}  # fmt: skip
AT_MOST = {"sql by base": 0.05}


@dataclass
class Question:
    """A conversation up to the question, and how to judge its answer."""

    messages: list[dict[str, str]]
    turn: Turn
    skill: str
    answer: str = ""
    stopped: bool = False
    scores: dict[str, bool] = field(default_factory=dict)


class Answerer:
    """Greedy answers of a transformers model in batches of like length."""

    def __init__(self, folder: Path, dtype: torch.dtype, adapter: str = "") -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        if adapter:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, folder / "adapters" / adapter)  # type: ignore[assignment]
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def answer(self, questions: list[Question], size: int = 512, limit: int = 130) -> None:
        """Fill in answer and stopped."""
        texts = [
            self.tokenizer.apply_chat_template(
                q.messages, tokenize=False, add_generation_prompt=True
            )
            for q in questions
        ]
        order = sorted(
            range(len(texts)), key=lambda i: (len(questions[i].turn.answer) // 40, len(texts[i]))
        )
        for at in range(0, len(order), size):
            part = order[at : at + size]
            batch = self.tokenizer(
                [texts[i] for i in part],
                return_tensors="pt",
                padding=True,
                add_special_tokens=False,
            ).to(self.model.device)
            batch.pop("token_type_ids", None)
            out = self.model.generate(**batch, max_new_tokens=limit, do_sample=False)
            for i, ids in zip(part, out[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                questions[i].stopped = END in ids
                kept = ids[: ids.index(END)] if END in ids else ids
                questions[i].answer = self.tokenizer.decode(kept, skip_special_tokens=True)


def messages_of(turns: list[Turn], system: str = "") -> list[dict[str, str]]:
    """All turns as messages, without the last answer."""
    found = [{"role": "system", "content": system}] if system else []
    for t in turns:
        found += [{"role": "user", "content": t.user}, {"role": "assistant", "content": t.answer}]
    return found[:-1]


def base_questions(count: int, seed: int) -> list[Question]:
    """About `count` held-out questions per scored skill."""
    rng = Random(f"evaluation {seed}")
    wanted: dict[str, int] = defaultdict(int)
    found: list[Question] = []
    for name, (_, skill) in corpus.SKILLS.items():
        tries = 0
        while wanted[name] < count and tries < count * 60:
            tries += 1
            turns = skill(rng)
            if not held_out(turns[-1].key):
                continue
            wanted[name] += 1
            # A third of the questions come after other exchanges.
            before = corpus.any_skill(rng) if rng.random() < 0.33 else []
            if turns[-1].skill in ("context", "remember name"):
                before = []
            found.append(Question(messages_of([*before, *turns]), turns[-1], turns[-1].skill))
    return found


def longer_questions(
    count: int, seed: int, tokens: Callable[[corpus.Document], int]
) -> list[Question]:
    """Names over several turns, and pass keys in about 1500 tokens."""
    rng = Random(f"longer {seed}")
    found = []
    for kind, size in (("passkey 1.5k", 1500), ("passkey 0.5k", 500)):
        for _ in range(count // 2):
            key = str(rng.randrange(1000, 100000))
            pairs: corpus.Document = []
            while len(pairs) != 2 or not 0.85 < tokens(pairs) / size < 1.25:
                pairs = longer.passkey(rng, lambda: corpus.any_skill(rng)[0].answer, size, key)
            messages = [{"role": r, "content": t} for r, t in pairs[:-1]]
            found.append(Question(messages, Turn("", pairs[-1][1], kind), kind))
    for _ in range(count):
        told = corpus.draw(rng, rng.choice((context.name_later, context.mine)), True)
        middle = [t for _ in range(rng.randrange(1, 4)) for t in corpus.any_skill(rng)]
        middle = [t for t in middle if t.skill not in ("remember name", "noted", "context")]
        found.append(Question(messages_of([told[0], *middle, told[1]]), told[1], "remember later"))
    return found


def loops(text: str, size: int = 8) -> bool:
    """True when some eight words in a row come twice."""
    words = text.lower().split()
    runs = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return len(set(runs)) < len(runs)


def right(q: Question) -> bool:
    """Exact match, or the words of a story without loops."""
    if q.turn.skill == "stories":
        text = q.answer.lower()
        found = all(re.search(rf"\b{re.escape(w)}", text) for w in q.turn.words)
        return found and not loops(q.answer) and len(q.answer.split()) >= 20
    if q.turn.accept:
        return q.answer in q.turn.accept
    return q.answer == q.turn.answer


def task_questions(task: str, count: int, seed: int) -> list[Question]:
    """Held-out questions of an adapter's task."""
    rng = Random(f"{task} evaluation {seed}")
    found = []
    if task == "pirate":
        while len(found) < count:
            turns = corpus.any_skill(rng)
            last = turns[-1]
            if last.fact and last.skill not in ("lists", "letters"):
                spoken = [pirate.spoken(t) for t in turns]
                found.append(Question(messages_of(spoken), last, task))
        return found
    skill, system = (sql.query, sql.SYSTEM) if task == "sql" else (jsonform.record, jsonform.SYSTEM)
    for i in range(count):
        turns = corpus.draw(rng, skill, True)
        found.append(Question(messages_of(turns, system if i % 4 else ""), turns[-1], task))
    return found


def judge(task: str, questions: list[Question], db: sqlite3.Connection) -> dict[str, float]:
    """Scores of an adapter's answers."""

    def share(test: Callable[[Question], bool]) -> float:
        return sum(map(test, questions)) / len(questions)

    if task == "sql":
        return {"sql": share(lambda q: sql.rows(db, q.answer) == sql.rows(db, q.turn.answer))}
    if task == "json":
        return {"json": share(right), "json parses": share(lambda q: parses(q.answer))}
    return {
        "pirate style": share(lambda q: pirate.in_style(q.answer)),
        "pirate facts": share(lambda q: pirate.keeps(q.turn.fact, q.answer)),
    }


def parses(text: str) -> bool:
    """True for one JSON object with the keys of its type."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return isinstance(found, dict) and tuple(found) == jsonform.KEYS.get(found.get("type", ""))


def evaluate_base(
    folder: Path, dtype: torch.dtype, count: int, seed: int, wrong: int
) -> dict[str, dict[str, float]]:
    """Score the base per skill, and on the adapters' questions."""
    answerer = Answerer(folder, dtype)
    questions = base_questions(count, seed)
    answerer.answer(questions)

    def tokens(pairs: corpus.Document) -> int:
        return len(answerer.tokenizer(pairs[0][1])["input_ids"])

    late = longer_questions(count, seed, tokens)
    answerer.answer(late, size=128, limit=40)
    by: dict[str, list[Question]] = defaultdict(list)
    for q in questions + late:
        by[q.skill].append(q)
    report = {}
    for skill in sorted(by):
        score = sum(map(right, by[skill])) / len(by[skill])
        report[skill] = {"score": round(score, 4), "questions": len(by[skill])}
        for q in [q for q in by[skill] if not right(q)][:wrong]:
            print(
                f"  {skill}: {q.messages[-1]['content'][-90:]!r} -> {q.answer[:110]!r} "
                f"(wanted {q.turn.answer[:90]!r})"
            )
    stopped = sum(q.stopped for q in questions) / len(questions)
    report["stop"] = {"score": round(stopped, 4), "questions": len(questions)}
    asked = task_questions("sql", count, seed)
    answerer.answer(asked)
    score = judge("sql", asked, sql.database())["sql"]
    report["sql by base"] = {"score": round(score, 4), "questions": len(asked)}
    return report


def evaluate_adapters(
    folder: Path, dtype: torch.dtype, count: int, seed: int, wrong: int
) -> dict[str, dict[str, float]]:
    """Score every adapter that lies in the folder."""
    scores = {}
    for task in adapters.TASKS:
        if not (folder / "adapters" / task / "adapter_model.safetensors").exists():
            continue
        answerer = Answerer(folder, dtype, task)
        questions = task_questions(task, count, seed)
        answerer.answer(questions)
        for name, score in judge(task, questions, sql.database()).items():
            scores[name] = {"score": round(score, 4), "questions": len(questions)}
        test = {"sql": lambda q: judge("sql", [q], sql.database())["sql"] == 1, "json": right}.get(
            task
        )
        for q in [q for q in questions if test and not test(q)][:wrong]:
            print(
                f"  {task}: {q.messages[-1]['content']!r} -> {q.answer!r} "
                f"(wanted {q.turn.answer!r})"
            )
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("kvrun/tiny"))
    parser.add_argument("--count", type=int, default=200, help="questions per skill")
    parser.add_argument(
        "--parts",
        nargs="+",
        default=["base", "adapters"],
        choices=["base", "adapters"],
        help="what to score; the rest is taken from the report that is written",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--wrong", type=int, default=0, help="show so many wrong answers per skill")
    parser.add_argument("--write", type=Path, help="write the report here (eval.json)")
    args = parser.parse_args()
    dtype, start = getattr(torch, args.dtype), time.perf_counter()
    scores: dict[str, dict[str, float]] = {}
    if len(args.parts) == 1 and args.write and args.write.exists():
        scores = json.loads(args.write.read_text(encoding="utf-8"))["scores"]
    options = (args.folder, dtype, args.count, args.seed, args.wrong)
    if "base" in args.parts:
        scores |= evaluate_base(*options)
    if "adapters" in args.parts:
        scores |= evaluate_adapters(*options)
    missed: list[str] = []
    for name, row in scores.items():
        gate = GATES.get(name, AT_MOST.get(name))
        met = gate is None or (row["score"] <= gate if name in AT_MOST else row["score"] >= gate)
        if gate is not None:
            row["gate"] = gate
        if not met:
            missed.append(name)
        print(
            f"{name:18} {row['score']:.3f} of {row['questions']:4}  gate {gate or '-'}"
            f"{'' if met else ' MISSED'}"
        )
    print(f"{time.perf_counter() - start:.0f} s")
    if args.write:
        sizes = {
            p.relative_to(args.folder).as_posix(): p.stat().st_size
            for p in sorted(args.folder.rglob("*.safetensors"))
        }
        report = {
            "recipe": VERSION, "seed": args.seed, "dtype": args.dtype, "decoding": "greedy",
            "missed": sorted(missed), "scores": scores, "bytes": sizes,
        }  # fmt: skip
        args.write.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
