"""The engine on one GPU: decode steps, prompts, time to first token, and two mixed workloads.

`python benchmarks/engine.py --shape llama-3-8b`. Weights are random (nothing to download), prompts
are token ids, decoding is greedy, ends of text are ignored, the prefix cache is off. Workloads:

* decode step at batch b: b prompts of 512 tokens; (time of 136 new tokens - time of 8) / 128
* prefill: 8 prompts of 8192 tokens, one new token each
* first token: one prompt of 512 tokens, one new token; median of 9
* mixed256, mixed1000: so many requests of random lengths, submitted at once; output tokens / time

The bound of a decode step is the time to read weights and cache at the rate that a large product of
one row reads at, or to compute at the rate of a large product, whichever is more for each part.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kvrun import LLM, SamplingParams
from kvrun.bench import shapes, workloads
from kvrun.bench.roofline import Ceilings, Cost
from kvrun.runtime.hf_config import HFConfig

SHAPES = ("llama-3-8b", "qwen3-0.6b")
BATCHES = (1, 8, 32, 128, 256)
CONTEXT = 576  # the mean of a decode step's sequences
WORKLOADS = ("decode", "prefill", "first", "mixed256", "mixed1000")


def seconds(llm: LLM, prompts: Sequence[Any], new: int | Sequence[int]) -> float:
    """How long it takes until every prompt has its new tokens."""
    counts = [new] * len(prompts) if isinstance(new, int) else new
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in counts]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    outputs = llm.generate(list(prompts), params)
    spent = time.perf_counter() - begun
    assert all(output.finish_reason == "length" for output in outputs)
    return spent


def ceilings() -> tuple[float, float]:
    """Bytes/s of a large product of one row, FLOP/s of a large square one, random bf16 data."""
    matrices = [torch.randn(28672, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(8)]
    row = torch.randn(1, 4096, dtype=torch.bfloat16, device="cuda")
    square = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    read = _rate(lambda: [row @ m.t() for m in matrices], 8 * matrices[0].nbytes)
    return read, _rate(lambda: square @ square, 2 * 8192**3)


def _rate(work: Callable[[], object], amount: float) -> float:
    times = []
    for _ in range(12):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return amount / statistics.median(times)


def decode(llm: LLM, batch: int, repeats: int) -> list[float]:
    prompts = workloads.fixed(batch, 512)
    seconds(llm, prompts, 4)
    return [(seconds(llm, prompts, 136) - seconds(llm, prompts, 8)) / 128 for _ in range(repeats)]


def run(name: str, wanted: list[str], repeats: int) -> dict[str, Any]:
    with shapes.folder(name) as folder:
        return measured(name, folder, wanted, repeats)


def measured(name: str, folder: Path, wanted: list[str], repeats: int) -> dict[str, Any]:
    cost = Cost.of(HFConfig.read(folder))
    begun = time.perf_counter()
    llm = LLM(str(folder), load_format="dummy", prefix_caching=False, max_model_len=10240)
    found: dict[str, Any] = {
        "shape": name,
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "start_s": time.perf_counter() - begun,
    }
    print(
        f"{name} on {found['device']}: ready after {found['start_s']:.1f} s; {llm.plan}", flush=True
    )
    found["read_bytes_s"], found["flops_s"] = rates = ceilings()
    print(f"reads {rates[0] / 1e12:.2f} TB/s, multiplies {rates[1] / 1e12:.0f} TFLOP/s", flush=True)
    for batch in BATCHES if "decode" in wanted else ():
        steps = [1e3 * s for s in decode(llm, batch, repeats)]
        least = 1e3 * cost.step(batch, CONTEXT).seconds(Ceilings(*rates))
        middle = statistics.median(steps)
        found[f"decode_{batch}_ms"] = {"steps": steps, "bound": least}
        print(
            f"decode, batch {batch:3}: {middle:7.3f} ms ({min(steps):.3f} to {max(steps):.3f}), "
            f"{least / middle:.0%} of the bound, {1e3 * batch / middle:,.0f} tok/s",
            flush=True,
        )
    if "prefill" in wanted:
        seconds(llm, workloads.fixed(1, 8192, 5), 1)
        rate = 65536 / min(seconds(llm, workloads.fixed(8, 8192), 1) for _ in range(repeats))
        found["prefill_tok_s"] = rate
        print(f"prefill 8 x 8192: {rate:,.0f} tok/s", flush=True)
    if "first" in wanted:
        first = 1e3 * statistics.median(
            seconds(llm, workloads.fixed(1, 512, 10 + i), 1) for i in range(9)
        )  # fmt: skip
        found["first_token_ms"] = first
        print(f"first token, 512 tokens: {first:.2f} ms", flush=True)
    for label in ("mixed256", "mixed1000"):
        if label in wanted:
            work = workloads.mixed(label)
            spent = seconds(llm, work.prompts, work.output_tokens)
            found[f"{label}_tok_s"] = work.total_output / spent
            print(f"{label}: {work.total_output / spent:,.0f} output tok/s", flush=True)
    llm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    names = SHAPES if args.shape == "all" else (args.shape,)
    found = [run(name, args.only, args.repeats) for name in names]
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
