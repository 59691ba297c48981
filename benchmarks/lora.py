"""Many LoRA adapters in one batch on one GPU: what a decode step costs over the same step without.

`python benchmarks/lora.py`. First the kernels are compared with their twins on this device, and
greedy tokens of the built-in model and its adapters with captured steps and without. Then, for the
shape of Llama 3 8B with random weights and adapters of rank 16 on all seven products:

* decode step at batch b: b prompts of 512 tokens; (time of 136 new tokens - time of 8) / 128
* the same with 1, 8, 32 or 64 adapters among the requests, beside the step of the base model, and
  the time that reading each adapter once takes at the rate of a large product of one row
* load: `load_adapter` of a folder in the page cache until its first token, a prompt of 32 tokens;
  `lora_load.py` beside this file says what becomes of the time

`--only load` or `--only steps` does one of both, without the comparisons.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import needs  # beside this file, as the next two
import numpy as np
import torch
from engine import ceilings
from lora_load import RANK, write_adapter

from kvrun import LLM, SamplingParams
from kvrun.bench import shapes, workloads
from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.kernels import lora as twin
from kvrun.runtime.lora.rows import tiled
from kvrun.runtime.lora.sites import Sites

SHAPE = "llama-3-8b"
CASES = ((1, 1), (8, 1), (8, 8), (32, 32), (64, 1), (64, 64))  # requests, adapters
MIXES = {
    "one row": [3],
    "one adapter": [2] * 40,
    "distinct": [*range(1, 9)],
    "mixed": [0, 5, 1, 1, 0, 3, 2, 5, 5, 6, 7, 4, 0, 8, 5, 1, 1, 1, 5, 5] * 9,
}


def check_kernels() -> None:
    """Every mix, dtype and prologue: the kernels' result is the twins'."""
    from kvrun.runtime.kernels.triton import lora

    torch.manual_seed(0)
    outs, k = (512, 128, 136), 1032
    sites = Sites([tuple(Shard(str(p), out, k) for p, out in enumerate(outs))])
    ranks = [(16, 16, 16), (8, 0, 8), (1, 2, 4), (64, 64, 64), (16, 0, 0), (0, 5, 0),
             (256, 8, 16), (0, 0, 0)]  # fmt: skip
    tables, start = [np.zeros((1, sites.width))], 0
    for each in ranks:
        layout = sites.lay_out({(0, p): r for p, r in enumerate(each) if r})
        table = layout.table.copy()
        table[:, 0] += start
        table[:, 2::3] += start
        tables.append(table)
        start += layout.size
    table = torch.from_numpy(np.concatenate(tables)).long().cuda()
    worst = 0.0
    for dtype, most in ((torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float32, 1e-5)):
        arena = (torch.randn(start) * 0.05).to("cuda", dtype)
        for name, slots in MIXES.items():
            for norm in (False, True):
                for height in (16, 64):
                    found = tiled(np.array(slots), height)
                    rows, tiles = (torch.from_numpy(part).cuda() for part in found)
                    x = torch.randn(len(slots), k).to("cuda", dtype)
                    weight = torch.rand(k).cuda() if norm else None
                    results = []
                    for kernel in (lora, twin):
                        where = (arena, table, rows, tiles)
                        sizes: Any = {"height": height, "features": k}
                        sums = kernel.shrink(x, *where, **sizes, width=288, norm=weight, parts=3)
                        y = torch.zeros(len(slots), sum(outs), device="cuda", dtype=dtype)
                        eps = 1e-5 if norm else None
                        kernel.expand(sums, y, *where, **sizes, outs=outs, eps=eps)
                        results.append(y.double())
                    off = float((results[0] - results[1]).norm() / results[1].norm())
                    worst = max(worst, off / most)
                    assert off < most, (str(dtype), name, norm, height, off)
    print(f"kernels equal their twins (at most {worst:.0%} of the tolerance)", flush=True)


def check_tokens() -> None:
    """The built-in adapters: the same greedy tokens with captured steps and kernel by kernel."""
    names = ["sql", None, "json", "pirate"] * 3
    texts = ["Show the names of all users.", "What is 12 + 30?", "Anna is 31 and lives in Rome."]
    chats = [[{"role": "user", "content": texts[n % 3]}] for n in range(len(names))]
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    found = []
    for graphs in (True, False):
        with LLM("tiny", dtype="float32", cuda_graphs=graphs) as llm:
            found.append([o.token_ids for o in llm.chat(chats, params, adapter=names)])
            alone = [llm.chat(c, params, adapter=n)[0] for c, n in zip(chats, names, strict=True)]
            assert [o.token_ids for o in alone] == found[-1]
    assert found[0] == found[1]
    assert found[0][0] != found[0][3]
    print("greedy tokens agree: captured, kernel by kernel, together and alone", flush=True)


def seconds(llm: LLM, prompts: Sequence[Any], new: int, adapters: Any) -> float:
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    torch.cuda.synchronize()
    begun = time.perf_counter()
    outputs = llm.generate(list(prompts), params, adapter=adapters)
    spent = time.perf_counter() - begun
    assert all(output.finish_reason == "length" for output in outputs), outputs[0].error
    return spent


def step_ms(llm: LLM, batch: int, adapters: Any, repeats: int) -> float:
    prompts = workloads.fixed(batch, 512)
    seconds(llm, prompts, 24, adapters)
    steps = [
        (seconds(llm, prompts, 136, adapters) - seconds(llm, prompts, 8, adapters)) / 128
        for _ in range(repeats)
    ]
    return 1e3 * statistics.median(steps)


def load_ms(llm: LLM, repeats: int = 5) -> list[dict[str, float]]:
    """From the call to the first token, each time as a new adapter: its reader's part (`read`), the
    call to `load_adapter` (`load`), and with the copy to the device and the first step (`all`)."""
    sites = llm._engine._bank.sites  # type: ignore[union-attr]
    found = []
    with tempfile.TemporaryDirectory() as name:
        write_adapter(Path(name), sites)
        prompt = workloads.fixed(1, 32)[0]
        for number in range(repeats):
            begun = time.perf_counter()
            info = llm.load_adapter(f"file {number}", name)
            loaded = time.perf_counter() - begun
            stream = llm.stream(prompt, adapter=f"file {number}")
            next(stream)
            spent = time.perf_counter() - begun
            stream.close()  # type: ignore[attr-defined]
            seconds = {"read": info.load_seconds or 0.0, "load": loaded, "all": spent}
            found.append({phase: 1e3 * each for phase, each in seconds.items()})
    return found


def measured(folder: Path, repeats: int, only: str | None) -> dict[str, Any]:
    adapters = {f"a{n}": f"dummy:{RANK}:{n}" for n in range(64)}
    llm = LLM(
        str(folder), load_format="dummy", prefix_caching=False, max_model_len=2048,
        max_num_seqs=64, adapters=adapters, lora_memory=6_500_000_000,
    )  # fmt: skip
    gc.freeze()  # as the engine does in a process of its own
    size = llm.adapters()[0].bytes
    device, rate = torch.cuda.get_device_name(), ceilings()[0]
    print(f"{SHAPE} on {device}, an adapter has {size / 1e6:.1f} MB, {rate / 1e12:.2f} TB/s")
    found: dict[str, Any] = {"device": device, "adapter_bytes": size, "read_bytes_s": rate}
    base: dict[int, float] = {}
    for batch, count in () if only == "load" else CASES:
        if batch not in base:
            base[batch] = step_ms(llm, batch, None, repeats)
        names = [f"a{n % count}" for n in range(batch)]
        step, least = step_ms(llm, batch, names, repeats), 1e3 * count * size / rate
        found[f"{batch}/{count}"] = {"ms": step, "base_ms": base[batch], "floor_ms": least}
        print(
            f"{batch:3} requests, {count:2} adapters: {step:6.3f} ms, base {base[batch]:6.3f} ms, "
            f"+{step - base[batch]:.3f} ms ({base[batch] / step:.0%} of base), the adapters' bytes "
            f"{least:.3f} ms",
            flush=True,
        )
    found["load_ms"] = [] if only == "steps" else load_ms(llm)
    for phase in ("read", "load", "all") if found["load_ms"] else ():
        times = ", ".join(f"{load[phase]:.0f}" for load in found["load_ms"])
        print(f"load to first token, {phase}: {times} ms")
    llm.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--only", choices=("steps", "load"))
    parser.add_argument("--json", type=Path, help="write all figures there")
    args = parser.parse_args()
    needs.gpu("measure a CPU with `kvrun bench lora`", triton=True)
    if args.only is None:
        check_kernels()
        check_tokens()
    with shapes.folder(SHAPE) as folder:
        found = measured(folder, args.repeats, args.only)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
