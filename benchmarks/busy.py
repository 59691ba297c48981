"""What a busy program beside it costs kvrun on CPU: tokens/s alone, and while others compute.

    python benchmarks/busy.py [--shape smollm2-135m] [--model FOLDER] [--programs 1] [--turns 3]

Each turn measures 1 and 8 sequences of 128 tokens in this process, alone and then beside endless
loops in processes of their own, each after a run that does not count: the engine needs up to 128
steps to notice that it has the machine to itself again. The median of the turns counts.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from kvrun import LLM, SamplingParams
from kvrun.bench import shapes

TOKENS = 128
PROMPT = [5, 9, 77, 7, 300]


def rate(llm: LLM, count: int) -> float:
    """Tokens/s of so many sequences at once."""
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    begun = time.perf_counter()
    llm.generate([[*PROMPT, n] for n in range(count)], params)
    return TOKENS * count / (time.perf_counter() - begun)


@contextlib.contextmanager
def busy(programs: int) -> Iterator[None]:
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="smollm2-135m", choices=shapes.SHAPES)
    parser.add_argument("--model", help="a folder or a built-in model instead of a shape")
    parser.add_argument("--programs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    found: dict[tuple[int, bool], list[float]] = {}
    with contextlib.ExitStack() as stack:
        if options.model:
            llm = LLM(options.model, device="cpu", prefix_caching=False)
        else:
            folder = stack.enter_context(shapes.folder(options.shape))
            llm = LLM(
                str(folder), device="cpu", load_format="dummy", max_model_len=256,
                prefix_caching=False,
            )  # fmt: skip
        stack.enter_context(llm)
        for _ in range(options.turns):
            for beside in (False, True):
                with busy(options.programs if beside else 0):
                    for count in (1, 8):
                        rate(llm, count)
                        found.setdefault((count, beside), []).append(rate(llm, count))
    for count in (1, 8):
        alone, shared = (statistics.median(found[count, kind]) for kind in (False, True))
        print(f"{count} at once: {alone:,.0f} tokens/s alone, {shared:,.0f} beside")


if __name__ == "__main__":
    main()
