"""The engine on one GPU: decode steps, prompts, time to first token, and two mixed workloads.

`python benchmarks/engine.py --shape llama-3-8b`; with `--engine kvrun vllm` the same on each, one
after the other, if vLLM is installed. Weights are random (nothing to download), prompts are token
ids, decoding is greedy, ends of text are ignored, the prefix cache is off, vLLM may use 92 % of the
memory; what else there is to choose is as the engine has it. Workloads:

* decode step at batch b: b prompts of 512 tokens; (time of 136 new tokens - time of 8) / 128
* prefill: 8 prompts of 8192 tokens, one new token each
* first token: one prompt of 512 tokens, one new token; median of 9
* mixed256, mixed1000: so many requests of random lengths, submitted at once; output tokens / time

The bound of a decode step is the time to read weights and cache at the rate that a large product of
one row reads at, or to compute at the rate of a large product, whichever is more for each part.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import needs  # beside this file
import torch

from kvrun.bench import plot, shapes, workloads
from kvrun.bench.cuda_rates import measure
from kvrun.bench.roofline import Ceilings, Cost
from kvrun.runtime.hf_config import HFConfig

SHAPES = ("llama-3-8b", "qwen3-0.6b")  # of "all"
BATCHES = (1, 8, 32, 128, 256)
CONTEXT = 576  # the mean of a decode step's sequences
LONGEST = 10240  # tokens of a prompt and its answer
WORKLOADS = ("decode", "prefill", "first", "mixed256", "mixed1000")


Generate = Callable[[list[Any], list[int]], None]


def seconds(generate: Generate, prompts: Sequence[Any], new: int | Sequence[int]) -> float:
    """How long it takes until every prompt has its new tokens."""
    counts = [new] * len(prompts) if isinstance(new, int) else list(new)
    begun = time.perf_counter()
    generate(list(prompts), counts)
    return time.perf_counter() - begun


def ceilings() -> tuple[float, float]:
    """Bytes/s of a large product of one row, FLOP/s of a large square one, random bf16 data."""
    rates = {rate.name: rate.value for rate in measure(torch.device("cuda", 0), quick=True)}
    return rates["read, bfloat16 GEMV"], rates["bfloat16"]


def device_and_ceilings() -> tuple[str, tuple[float, float]]:
    return torch.cuda.get_device_name(), ceilings()


def decode(generate: Generate, batch: int, repeats: int) -> list[float]:
    prompts = workloads.fixed(batch, 512)
    seconds(generate, prompts, 4)
    return [
        (seconds(generate, prompts, 136) - seconds(generate, prompts, 8)) / 128
        for _ in range(repeats)
    ]


def measured(
    engine: str, name: str, wanted: list[str], batches: list[int], repeats: int,
    rates: tuple[float, float],
) -> dict[str, Any]:  # fmt: skip
    """Prints and returns the figures, in a process that has not used the GPU yet."""
    with shapes.folder(name) as folder:
        cost = Cost.of(HFConfig.read(folder))
        begun = time.perf_counter()
        version, generate = OPEN[engine](folder)
        start = time.perf_counter() - begun
    gc.collect()  # what the start has left is not the first workload's to clear away
    print(f"{name}, {version}: ready after {start:.1f} s", flush=True)
    found: dict[str, Any] = {"shape": name, "engine": version, "start_s": start}
    for batch in batches if "decode" in wanted else ():
        steps = [1e3 * s for s in decode(generate, batch, repeats)]
        middle = statistics.median(steps)
        least = 1e3 * cost.step(batch, CONTEXT).seconds(Ceilings(*rates))
        found[f"decode_{batch}_ms"] = {"steps": steps, "bound": least}
        print(
            f"decode, batch {batch:3}: {middle:7.3f} ms ({min(steps):.3f} to {max(steps):.3f}), "
            f"{least / middle:.0%} of the bound, {1e3 * batch / middle:,.0f} tok/s",
            flush=True,
        )
    if "prefill" in wanted:
        seconds(generate, workloads.fixed(1, 8192, 5), 1)
        spans = [seconds(generate, workloads.fixed(8, 8192), 1) for _ in range(repeats)]
        found["prefill_tok_s"] = 65536 / min(spans)
        print(f"prefill 8 x 8192: {found['prefill_tok_s']:,.0f} tok/s", flush=True)
    if "first" in wanted:
        spans = [seconds(generate, workloads.fixed(1, 512, 10 + i), 1) for i in range(9)]
        found["first_token_ms"] = 1e3 * statistics.median(spans)
        print(f"first token, 512 tokens: {found['first_token_ms']:.2f} ms", flush=True)
    for label in ("mixed256", "mixed1000"):
        if label in wanted:
            work = workloads.mixed(label)
            spent = seconds(generate, work.prompts, work.output_tokens)
            found[f"{label}_tok_s"] = work.total_output / spent
            print(f"{label}: {work.total_output / spent:,.0f} output tok/s", flush=True)
    return found


def longest(folder: Path) -> int:
    """Tokens of a sequence, at most: some shapes were made for fewer than LONGEST."""
    return min(LONGEST, HFConfig.read(folder).integer("max_position_embeddings"))


def open_kvrun(folder: Path) -> tuple[str, Generate]:
    from kvrun import LLM, SamplingParams, __version__

    llm = LLM(str(folder), load_format="dummy", prefix_caching=False,
              max_model_len=longest(folder))  # fmt: skip

    def generate(prompts: list[Any], counts: list[int]) -> None:
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in counts]
        outputs = llm.generate(prompts, params)
        assert [len(o.token_ids) for o in outputs] == counts

    return f"kvrun {__version__}", generate


def open_vllm(folder: Path) -> tuple[str, Generate]:
    from vllm import LLM, SamplingParams, __version__

    llm = LLM(
        str(folder), dtype="bfloat16", load_format="dummy", enable_prefix_caching=False,
        skip_tokenizer_init=True, max_model_len=longest(folder), gpu_memory_utilization=0.92,
    )  # fmt: skip

    def generate(prompts: list[Any], counts: list[int]) -> None:
        params = [
            SamplingParams(max_tokens=n, temperature=0, ignore_eos=True, detokenize=False)
            for n in counts
        ]
        asked: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        outputs = llm.generate(asked, params, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == counts

    return f"vllm {__version__}", generate


OPEN = {"kvrun": open_kvrun, "vllm": open_vllm}


def alone(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns, from a process of its own: whatever it took is free afterwards."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def picture(found: list[dict[str, Any]]) -> str:
    """How many times as fast kvrun is as another engine, an SVG: the best of each one's records."""
    bars = []
    others = dict.fromkeys(f["engine"] for f in found if not f["engine"].startswith("kvrun"))
    for shape in dict.fromkeys(f["shape"] for f in found):
        for other in others:
            mine, theirs = _best(found, shape, "kvrun"), _best(found, shape, other)
            for key in (key for key in theirs if key in mine):
                time = key.endswith("_ms")
                ratio = theirs[key] / mine[key] if time else mine[key] / theirs[key]
                label = key.removesuffix("_ms").removesuffix("_tok_s").replace("_", " ")
                bars.append(plot.Bar(f"{label}, {shape}", round(ratio, 2), group=shape))
    title = f"kvrun's speed as a multiple of {', '.join(others)}"
    return plot.svg(title, str(found[0]["device"]), bars)


def _best(found: list[dict[str, Any]], shape: str, engine: str) -> dict[str, float]:
    best: dict[str, float] = {}
    for one in found:
        if one["shape"] != shape or not one["engine"].startswith(engine):
            continue
        for key in (key for key in one if key.endswith(("_ms", "_tok_s"))):
            value = one[key]
            value = statistics.median(value["steps"]) if isinstance(value, dict) else value
            better = min if key.endswith("_ms") else max
            best[key] = better(value, best.get(key, value))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*shapes.SHAPES, "all"], default="all")
    parser.add_argument("--engine", nargs="+", choices=[*OPEN], default=["kvrun"])
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES), help="of decode")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE.svg", help="kvrun beside the others")
    args = parser.parse_args()
    needs.gpu("measure a CPU with benchmarks/peers.py")
    for engine in args.engine:
        needs.package(engine, engine)
    found: list[dict[str, Any]] = []
    device, rates = alone(device_and_ceilings)
    print(f"{device} reads {rates[0] / 1e12:.2f} TB/s, multiplies {rates[1] / 1e12:.0f} TFLOP/s")
    about = {"device": device, "torch": torch.__version__}
    about |= {"read_bytes_s": rates[0], "flops_s": rates[1]}
    for name in SHAPES if args.shape == "all" else (args.shape,):
        for engine in args.engine:
            asked = args.only, args.batch, args.repeats, rates
            found.append(alone(measured, engine, name, *asked) | about)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.plot:
        plot.save(args.plot, picture(found))


if __name__ == "__main__":
    main()
