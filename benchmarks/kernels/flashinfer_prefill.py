"""Prompts by FlashInfer's FlashAttention 3 beside our own kernel, as a layer calls them.

    kvrun env --compile --only bf16-128,bf16-128-window
    python benchmarks/kernels/flashinfer_prefill.py --json flashinfer_prefill.json

Each call has keys and values of its own, larger together than L2; what FlashInfer needs gathered
is part of its time. Both run in turns; the median of their rounds is printed.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import gpu  # beside this file
import torch

from kvrun.folder import load
from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.tensors import KVCache

CUDA, DTYPE, PAGE = torch.device("cuda"), torch.bfloat16, 64
LLAMA, QWEN = (32, 8, 128), (16, 8, 128)
# heads, (cached, new) of each sequence, window
CASES: list[tuple[tuple[int, int, int], list[tuple[int, int]], int | None]] = [
    (LLAMA, [(0, 1024)], None),
    (LLAMA, [(0, 2048)], None),
    (LLAMA, [(0, 4096)], None),
    (LLAMA, [(0, 8192)], None),
    (LLAMA, [(0, 2048)] * 4, None),
    (LLAMA, [(0, 3000), (0, 5192)], None),
    (LLAMA, [(8192, 8192)], None),
    (LLAMA, [(24576, 8192)], None),
    (LLAMA, [(24576, 1024)], None),
    (LLAMA, [(0, 8192)], 1024),
    (QWEN, [(0, 8192)], None),
    (QWEN, [(24576, 8192)], None),
]
LAYERS = 8


def work(heads: int, dim: int, lengths: list[tuple[int, int]], window: int | None) -> float:
    """Floating-point operations that the mask leaves."""
    pairs = 0
    for old, new in lengths:
        if window is None:
            pairs += new * old + new * (new + 1) // 2
        else:
            pairs += sum(min(window, place + 1) for place in range(old, old + new))
    return 4.0 * heads * dim * pairs


def prepare(
    shape: tuple[int, int, int], lengths: list[tuple[int, int]], window: int | None, name: str
) -> Callable[[], None]:
    """A step of `LAYERS` layers, as the engine would run it: planned once, attended in each."""
    heads, kv_heads, dim = shape
    specs = [
        AttentionSpec(n, heads, kv_heads, dim, dim**-0.5, window=window) for n in range(LAYERS)
    ]
    news, contexts = [new for _, new in lengths], [old + new for old, new in lengths]
    pages = [-(-context // PAGE) for context in contexts]
    cache = KVCache(specs, 1 + sum(pages), PAGE, DTYPE, CUDA)
    for n in range(LAYERS):
        cache.rows(n).normal_()
    order = (torch.randperm(sum(pages), device=CUDA) + 1).int()
    tables = torch.zeros((len(pages), max(pages)), dtype=torch.int32, device=CUDA)
    for row, own in enumerate(order.split(pages)):
        tables[row, : len(own)] = own
    ends = torch.tensor([0, *news], device=CUDA).cumsum(0)
    nothing = torch.zeros(sum(news), dtype=torch.int64, device=CUDA)
    backend = load("kvrun.runtime.attention", name).Attention(cache, DTYPE)
    inputs = [
        torch.randn(sum(news), heads + 2 * kv_heads, dim, device=CUDA).to(DTYPE)
        for _ in range(LAYERS)
    ]

    def step() -> None:
        batch = Batch(
            ids=nothing, positions=nothing, slot_mapping=nothing, block_tables=tables,
            cu_seqlens=ends, context_lens=torch.tensor(contexts, device=CUDA), last_rows=ends[1:],
            query_lens_host=news, context_lens_host=contexts, block_size=PAGE, backend=backend,
        )  # fmt: skip
        backend.plan(batch)
        for spec, qkv in zip(specs, inputs, strict=True):
            q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
            backend.attend(spec, q, k, v, batch)

    return step


def milliseconds(step: Callable[[], None]) -> float:
    """Of one layer."""
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    step()
    ended.record()
    ended.synchronize()
    return begun.elapsed_time(ended) / LAYERS


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json")
    options = parser.parse_args()
    gpu.needed()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    rows: list[dict[str, Any]] = []
    for shape, lengths, window in CASES:
        steps = {name: prepare(shape, lengths, window, name) for name in ("triton", "flashinfer")}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for step in steps.values():
            step()
        for _ in range(options.rounds):
            for name, step in steps.items():
                times[name].append(milliseconds(step))
        flops = work(shape[0], shape[2], lengths, window)
        row: dict[str, Any] = {"heads": shape, "lengths": lengths, "window": window}
        for name, taken in times.items():
            row[name] = statistics.median(taken)
            row[f"{name}_tflops"] = flops / row[name] / 1e9
        rows.append(row)
        label = "{}/{}x{}".format(*shape) + f" {lengths}" + (f" window {window}" if window else "")
        print(
            f"{label:<48} triton {row['triton']:7.3f} ms {row['triton_tflops']:4.0f} TFLOP/s   "
            f"flashinfer {row['flashinfer']:7.3f} ms {row['flashinfer_tflops']:4.0f} TFLOP/s   "
            f"x {row['triton'] / row['flashinfer']:.2f}",
            flush=True,
        )
        del steps
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
