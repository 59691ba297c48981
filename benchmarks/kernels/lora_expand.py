"""Which form of LoRA's second kernel is the fastest, at the sizes of Llama 3 8B, rank 16.

`python benchmarks/kernels/lora_expand.py`. Every form (tiles a program, outputs of a tile, warps, B
asked for ahead, registers) is compiled by several processes and timed where it matters
most, gate_up with 64 rows on 64 adapters. The best ones are then timed for every product and mix,
beside the form in use (`now`). Microseconds of `expand` alone in a captured step of 8 layers, each
with adapters of its own; `bytes` is what B takes at 3.2 TB/s. All give the sums of `now`.
"""

import argparse
import itertools
import multiprocessing
import os
import time
from collections.abc import Sequence

import gpu  # beside this file
import torch
from lora import CASES, PRODUCTS, RANK, RATE, Case, micros  # beside this file

from kvrun.runtime.kernels.triton import lora
from kvrun.runtime.kernels.triton.lora import Stream

Form = Stream | None
CHOICE = lora._form  # of the form in use
POINTS = [(name, *case) for case in CASES for name in PRODUCTS]
HARDEST = ("gate_up", 64, 64)


def forms() -> list[Form]:
    found: list[Form] = [None]
    for turns, block_n, warps, ahead in itertools.product(
        (1, 2, 4, 8), (128, 256, 512), (2, 4, 8), (False, True)
    ):
        # 4096 outputs in one program leave most of the GPU idle; one turn has nothing to ask for.
        if turns * block_n > 2048 or (turns == 1 and ahead):
            continue
        found.append(Stream(turns, block_n, warps, ahead))
        if block_n <= 256 and warps == 4:
            found.append(Stream(turns, block_n, warps, ahead, registers=80))
    return found


def compiled(work: tuple[Form, Sequence[tuple[str, int, int]]]) -> str:
    """Run a form once for each key that it is compiled for; what is wrong with it, or nothing."""
    form, points = work
    lora._form = (lambda *_: form) if form else CHOICE
    try:
        for name, rows, _ in points:
            case = Case(name, rows, 1, layers=1)
            case.expand(case.arenas[0], case.shrink(case.arenas[0]))
        torch.cuda.synchronize()
    except Exception as error:  # a form that this GPU cannot run is no candidate
        return f"{form}: {str(error).splitlines()[0]}"
    return ""


def timed(case: Case, found: Sequence[Form]) -> list[float]:
    """Microseconds of each form; infinite where its sums are not those of the first."""
    sums = case.shrink(case.arenas[0])
    times, expected = [], None
    for form in found:
        lora._form = (lambda *_, form=form: form) if form else CHOICE
        case.y.zero_()
        case.expand(case.arenas[0], sums)
        result = case.y.float()
        expected = result if expected is None else expected
        off = float((result - expected).norm() / expected.norm())
        if off > 1e-2:
            print(f"{case.name} {case.rows}/{case.adapters}: {form} is off by {off:.2g}")
        right = off <= 1e-2
        times.append(micros(lambda a: case.expand(a, sums), case.arenas) if right else torch.inf)
    return times


def said(form: Form) -> str:
    if form is None:
        return "now"
    limit = f", {form.registers} registers" if form.registers else ""
    return (
        f"{form.turns} x {form.block_n}, {form.warps} warps{', ahead' if form.ahead else ''}{limit}"
    )


def of_b(case: Case) -> float:
    return case.adapters * RANK * sum(case.outs) * 2 / RATE * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--best", type=int, default=8)
    parser.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1))
    args = parser.parse_args()
    gpu.needed()
    begun = time.perf_counter()
    every = forms()
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for wrong in pool.imap_unordered(compiled, [(form, [HARDEST]) for form in every]):
            if wrong:
                print(wrong)
                every = [form for form in every if not wrong.startswith(f"{form}: ")]
        print(f"{len(every)} forms, compiled after {time.perf_counter() - begun:.0f} s", flush=True)
        case = Case(*HARDEST)
        times = dict(zip(every, timed(case, every), strict=True))
        print(f"gate_up, 64 rows on 64 adapters, bytes {of_b(case):.1f}")
        for form in sorted(every, key=lambda form: times[form])[: 3 * args.best]:
            print(f"  {times[form]:6.1f}  {said(form)}")
        print(f"  {times[None]:6.1f}  now", flush=True)
        best = [None, *sorted((f for f in every if f), key=lambda f: times[f])[: args.best]]
        list(pool.imap_unordered(compiled, [(form, POINTS) for form in best]))
    print("forms:", *(f"  {number}: {said(form)}" for number, form in enumerate(best)), sep="\n")
    totals = [0.0] * len(best)
    for name, rows, adapters in POINTS:
        case = Case(name, rows, adapters)
        found = timed(case, best)
        totals = [total + one for total, one in zip(totals, found, strict=True)]
        print(
            f"{rows:3}/{adapters:2} {name:8} bytes {of_b(case):5.1f}:",
            *(f"{each:6.1f}" for each in found),
            f"  best {said(best[found.index(min(found))])}",
            flush=True,
        )
    print("all together:", *(f"{total:6.1f}" for total in totals))
    print(f"{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
