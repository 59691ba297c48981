"""What quantization costs the built-in model: exact answers to its held-out questions.

`python benchmarks/quant_quality.py --count 30` answers 30 questions of each skill with the model as
it is, written by `kvrun quantize` with each method and the built-in text, and rounded as it is
read.
"""

import argparse
import tempfile
from pathlib import Path

from kvrun import LLM, SamplingParams
from kvrun.hub.local import resolve
from kvrun.runtime.calibrate.job import Recipe, quantize
from kvrun.runtime.calibrate.samples import prompts
from kvrun.runtime.config import METHODS, QUANTIZE
from recipes.tiny.evaluate import Question, base_questions, right


def score(llm: LLM, questions: list[Question]) -> float:
    """The share of questions that are answered to the letter."""
    params = SamplingParams(max_tokens=130, temperature=0)
    for question, output in zip(
        questions, llm.chat([q.messages for q in questions], params), strict=True
    ):
        question.answer, question.stopped = output.text, output.finish_reason == "stop"
    return sum(map(right, questions)) / len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=30, help="questions of each skill")
    parser.add_argument("--only", nargs="+", help="plain, a method, or read:NAME")
    args = parser.parse_args()
    questions, tiny = base_questions(args.count, 0), resolve("tiny")
    seen, _ = prompts(tiny, "builtin", 128, 512)
    for name in args.only or ("plain", *METHODS, *(f"read:{q}" for q in QUANTIZE)):
        with tempfile.TemporaryDirectory() as folder:
            if name == "plain" or name.startswith("read:"):
                llm = LLM("tiny", quantize=name.partition(":")[2] or None)
            else:
                out = Path(folder) / "model"
                quantize(tiny, out, Recipe("tiny", name), seen)
                llm = LLM(str(out))
            with llm:
                share = score(llm, questions)
        print(f"{name}: {share:.2%} of {len(questions)}", flush=True)


if __name__ == "__main__":
    main()
