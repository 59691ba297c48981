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
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvrun import LLM, SamplingParams

COMMON = {"head_dim": 128, "max_position_embeddings": 10240, "hidden_act": "silu"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
        "tie_word_embeddings": False, "dtype": "bfloat16", **COMMON,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024,
        "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": True, "dtype": "bfloat16", **COMMON,
    },
}  # fmt: skip
BATCHES = (1, 8, 32, 128, 256)
WORKLOADS = ("decode", "prefill", "first", "mixed256", "mixed1000")


def fixed(count: int, length: int, seed: int = 1) -> list[list[int]]:
    source = random.Random(seed + 7919 * count + length)
    return [[source.randint(0, 10000) for _ in range(length)] for _ in range(count)]


def mixed(count: int, seed: int, low: int, high: int) -> tuple[list[list[int]], list[int]]:
    source = random.Random(seed)
    prompts = []
    for _ in range(count):
        length = source.randint(low, high)
        prompts.append([source.randint(0, 10000) for _ in range(length)])
    return prompts, [source.randint(low, high) for _ in range(count)]


def seconds(llm: LLM, prompts: list[list[int]], new: int | list[int]) -> float:
    """How long it takes until every prompt has its new tokens."""
    counts = new if isinstance(new, list) else [new] * len(prompts)
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in counts]
    torch.cuda.synchronize()
    begun = time.perf_counter()
    outputs = llm.generate(prompts, params)
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


def bound(
    shape: dict[str, Any], batch: int, read: float, flops: float, context: int = 576
) -> float:
    """Seconds that a decode step needs at least."""
    hidden, layers, dim = shape["hidden_size"], shape["num_hidden_layers"], shape["head_dim"]
    heads, kv = shape["num_attention_heads"], shape["num_key_value_heads"]
    matrices = hidden * (2 * heads + 2 * kv) * dim + 3 * hidden * shape["intermediate_size"]
    weights = layers * matrices + shape["vocab_size"] * hidden
    cache = batch * context * 2 * layers * kv * dim * 2
    return max(2 * weights / read, 2 * weights * batch / flops) + cache / read


def decode(llm: LLM, batch: int, repeats: int) -> list[float]:
    prompts = fixed(batch, 512)
    seconds(llm, prompts, 4)
    return [(seconds(llm, prompts, 136) - seconds(llm, prompts, 8)) / 128 for _ in range(repeats)]


def run(name: str, shape: dict[str, Any], wanted: list[str], repeats: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(json.dumps(shape))
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
        least = 1e3 * bound(shape, batch, *rates)
        middle = statistics.median(steps)
        found[f"decode_{batch}_ms"] = {"steps": steps, "bound": least}
        print(
            f"decode, batch {batch:3}: {middle:7.3f} ms ({min(steps):.3f} to {max(steps):.3f}), "
            f"{least / middle:.0%} of the bound, {1e3 * batch / middle:,.0f} tok/s",
            flush=True,
        )
    if "prefill" in wanted:
        seconds(llm, fixed(1, 8192, 5), 1)
        rate = 65536 / min(seconds(llm, fixed(8, 8192), 1) for _ in range(repeats))
        found["prefill_tok_s"] = rate
        print(f"prefill 8 x 8192: {rate:,.0f} tok/s", flush=True)
    if "first" in wanted:
        first = 1e3 * statistics.median(
            seconds(llm, fixed(1, 512, 10 + i), 1) for i in range(9)
        )  # fmt: skip
        found["first_token_ms"] = first
        print(f"first token, 512 tokens: {first:.2f} ms", flush=True)
    for label, arguments in (("mixed256", (256, 0, 100, 1024)), ("mixed1000", (1000, 3, 64, 512))):
        if label in wanted:
            prompts, counts = mixed(*arguments)
            spent = seconds(llm, prompts, counts)
            found[f"{label}_tok_s"] = sum(counts) / spent
            print(f"{label}: {sum(counts) / spent:,.0f} output tok/s", flush=True)
    llm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    names = list(SHAPES) if args.shape == "all" else [args.shape]
    found = [run(name, SHAPES[name], args.only, args.repeats) for name in names]
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
