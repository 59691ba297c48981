"""Tokens/s of kvrun and of transformers' generate: same weights, dtype, prompts and threads.

    python benchmarks/against_transformers.py [--model tiny] [--dtype float32 bfloat16]

Both run in one process, taking turns, greedy, end of text ignored; the median of the turns is
compared, because the speed of a shared machine drifts. Prompts are random ids.
"""

import argparse
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

from kvrun import LLM, SamplingParams
from kvrun.hub.local import resolve

PROMPT, NEW = 32, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--turns", type=int, default=7)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
    print(f"{torch.get_num_threads()} threads, {os.cpu_count()} CPUs; tokens/s, median of turns")
    print("dtype     batch   kvrun   transformers   ratio   its batch of 1 x")
    for dtype in options.dtype:
        compare(str(resolve(options.model)), dtype, options.turns)


def compare(folder: str, dtype: str, turns: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    source = random.Random(0)
    limit = model.config.vocab_size - 1
    with LLM(folder, dtype=dtype, prefix_caching=False, threads=torch.get_num_threads()) as llm:
        single = 0.0
        for batch in (1, 8):
            prompts = [[source.randint(10, limit) for _ in range(PROMPT)] for _ in range(batch)]
            ours, theirs = turn_by_turn(
                lambda prompts=prompts: answer(llm, prompts),
                lambda prompts=prompts: generate(model, prompts),
                turns,
            )
            ours, theirs = batch * NEW / ours, batch * NEW / theirs
            single = single or theirs
            print(
                f"{dtype:9} {batch:5} {ours:7.0f} {theirs:14.0f} {ours / theirs:7.2f} "
                f"{ours / single:7.2f}",
                flush=True,
            )


def turn_by_turn(
    ours: Callable[[], Any], theirs: Callable[[], Any], turns: int
) -> tuple[float, float]:
    """Median seconds of each, run alternately after one run that does not count."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 1):
        for place, run in enumerate((ours, theirs)):
            begun = time.perf_counter()
            run()
            if turn:
                seconds[place].append(time.perf_counter() - begun)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def answer(llm: LLM, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    for output in llm.generate(prompts, params):
        assert len(output.token_ids) == NEW


def generate(model: Any, prompts: list[list[int]]) -> None:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, pad_token_id=0
        )
    assert out.shape[1] == PROMPT + NEW


if __name__ == "__main__":
    main()
