"""Where the time of a decode step or of a prompt goes on a GPU: kernel by kernel, and what is idle.

    python benchmarks/kernel_times.py --shape qwen3-0.6b --batch 8
    python benchmarks/kernel_times.py --shape llama-3-8b --batch 1 --quantize int4
    python benchmarks/kernel_times.py --shape llama-3-8b --batch 8 --adapters 8
    python benchmarks/kernel_times.py --shape llama-3-8b --prompt 8192

Weights are random. Times are torch's profiler's. A kernel may start before the one in front of it
has ended, and wait: what counts as its own is by how much it ends later than all before it, so that
shares and idle time add up to the whole; `alone` is from its start to its end. On an H100 steps
and prompts take as long as `benchmarks/engine.py` measures, within 2 %.
"""

import argparse
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import needs  # beside this file
import torch
from torch.profiler import ProfilerActivity, profile

from kvrun import LLM, SamplingParams
from kvrun.bench import shapes, workloads

STEPS = 32
LAST = "_advance"  # the last kernel of every captured step


class Event(NamedTuple):
    name: str
    start: int  # ns
    end: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="qwen3-0.6b")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="sequences of a step")
    parser.add_argument("--context", type=int, default=512, help="tokens of each one's prompt")
    parser.add_argument("--prompt", type=int, metavar="TOKENS", help="one prompt and not steps")
    parser.add_argument("--quantize", metavar="METHOD")
    parser.add_argument("--adapters", type=int, default=0, help="how many, of rank 16, take turns")
    parser.add_argument("--top", type=int, default=16, help="kernels that are listed")
    args = parser.parse_args()
    needs.gpu("profile a CPU with torch.profiler")
    room = 2 * STEPS + reading(max(args.batch), args.context)
    longest = max(args.prompt or 0, args.context + room)
    adapters = {f"a{n}": f"dummy:16:{n}" for n in range(args.adapters)}
    with shapes.folder(args.shape) as folder:
        llm = LLM(
            str(folder), load_format="dummy", quantize=args.quantize, prefix_caching=False,
            max_model_len=longest + 64, max_num_seqs=max(64, *args.batch), adapters=adapters,
            lora_memory=6_500_000_000 if adapters else None,
        )  # fmt: skip
    if args.prompt:
        run(llm, 1, args.prompt, 1, [])
        show(f"a prompt of {args.prompt}", [recorded(llm, 1, args.prompt, 1, [])], args.top)
        return
    for batch in args.batch:
        run(llm, batch, args.context, 8, list(adapters))
        # Answers that began while other prompts were read end before others, and these steps are
        # left out.
        last = reading(batch, args.context)
        events = recorded(llm, batch, args.context, STEPS + 8 + last, list(adapters))
        steps = list(parted(events))[: -last or None][-STEPS:]
        show(f"a step of {batch} at {args.context} tokens", steps, args.top)


def reading(batch: int, context: int) -> int:
    """Steps in which such prompts are read, at most: 4096 tokens or more go into one."""
    return batch * context // 4096


def run(llm: LLM, batch: int, prompt: int, new: int, adapters: list[str]) -> None:
    params = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    which = [adapters[n % len(adapters)] for n in range(batch)] if adapters else None
    llm.generate(workloads.fixed(batch, prompt), params, adapter=which)


def recorded(llm: LLM, batch: int, prompt: int, new: int, adapters: list[str]) -> list[Event]:
    """What the device has done, in order."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run(llm, batch, prompt, new, adapters)
        torch.cuda.synchronize()
    results = found.profiler.kineto_results  # type: ignore[union-attr]
    events = [
        Event(e.name(), e.start_ns(), e.start_ns() + e.duration_ns())
        for e in results.events()
        if e.device_type() == torch.autograd.DeviceType.CUDA and not e.is_user_annotation()
    ]
    return sorted(events, key=lambda event: event.start)


def parted(events: list[Event]) -> Iterator[list[Event]]:
    """One captured step after the other, each from the end of the one before it."""
    ends = [place for place, event in enumerate(events) if LAST in event.name]
    for before, last in pairwise(ends):
        yield events[before : last + 1]


def show(what: str, parts: list[list[Event]], top: int) -> None:
    """A table of own times, the mean of all parts; of each the first event only says when it
    begins."""
    own: dict[str, list[float]] = {}
    whole = idle = 0.0
    for events in parts:
        reached = events[0].end
        whole += max(event.end for event in events) - reached
        for event in events[1:]:
            idle += max(0, event.start - reached)
            counted = max(0, event.end - max(reached, event.start))
            sums = own.setdefault(event.name, [0, 0, 0])
            for place, value in enumerate((1, counted, event.end - event.start)):
                sums[place] += value / len(parts)
            reached = max(reached, event.end)
    whole, idle = whole / len(parts) / 1e3, idle / len(parts) / 1e3
    print(f"\n{what}: {whole:,.1f} µs, of which {idle:,.1f} idle ({idle / whole:.1%})")
    print(f"{'kernel':60} {'times':>6} {'own µs':>8} {'alone':>8} {'sum µs':>9} {'share':>6}")
    ranked = sorted(own.items(), key=lambda item: -item[1][1])
    for name, (times, counted, spent) in ranked[:top]:
        each, alone = counted / times / 1e3, spent / times / 1e3
        print(
            f"{name[:60]:60} {times:6.0f} {each:8.2f} {alone:8.2f} {counted / 1e3:9.1f} "
            f"{counted / 1e3 / whole:6.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
