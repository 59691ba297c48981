"""Answer a file of questions, one per line, and write the transcript."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from recipes.tiny.evaluate import Answerer, Question
from recipes.tiny.grammar import Turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("kvrun/tiny"))
    parser.add_argument("--adapter", default="")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    lines = args.questions.read_text(encoding="utf-8").splitlines()
    questions = [
        Question([{"role": "user", "content": line.strip()}], Turn(line, "", ""), "")
        for line in lines
        if line.strip()
    ]
    Answerer(args.folder, torch.float32, args.adapter).answer(questions, size=64)
    text = "\n\n".join(
        f"{i + 1}. **{q.messages[-1]['content']}**\n   {q.answer}" for i, q in enumerate(questions)
    )
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
