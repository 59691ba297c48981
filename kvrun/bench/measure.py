"""Measure: the tests of `bench micro`, `latency` and `throughput` on one model, row by row."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvrun.bench.limits import Limits, shares
from kvrun.bench.roofline import Ceilings
from kvrun.bench.spread import deviation, mean, median, percentile
from kvrun.bench.target import Target
from kvrun.bench.workloads import Workload, fixed, inside
from kvrun.errors import KvrunError

Row = dict[str, Any]
Watch = Callable[[str], None]

# A decode step is the difference of two runs: both hold the prefill, and these first tokens.
SETTLE = 8
WARM_UP = 4  # new tokens of the run that does not count


@dataclass(frozen=True)
class Case:
    """One line of `bench micro`: `prompt` or `new` tokens of `batch` sequences behind `depth`."""

    prompt: int
    new: int
    batch: int
    depth: int

    @property
    def name(self) -> str:
        """As llama-bench names it: pp512, tg128 @ d1024."""
        what = f"pp{self.prompt}" if self.prompt else f"tg{self.new}"
        return f"{what} @ d{self.depth}" if self.depth else what

    @property
    def prompt_len(self) -> int:
        """Tokens that are there before the first new one."""
        return max(1, self.depth + self.prompt)

    @property
    def longest(self) -> int:
        """The most tokens of a sequence while the case runs."""
        return self.prompt_len + max(WARM_UP, SETTLE + self.new if self.new else 0)


def cases(
    prompts: Sequence[int], news: Sequence[int], batches: Sequence[int], depths: Sequence[int]
) -> list[Case]:
    """Every combination; a 0 among the lengths leaves that kind out."""
    shapes = [(p, 0) for p in prompts if p] + [(0, n) for n in news if n]
    return [Case(p, n, b, d) for p, n in shapes for d in depths for b in batches]


def micro(
    target: Target, todo: Sequence[Case], repetitions: int, limits: Limits, seed: int, watch: Watch
) -> Iterator[Row]:
    """One row per case: mean and deviation of tokens/s, median and percentiles of the time."""
    for case in todo:
        prompts = _prompts(target, case.batch, case.prompt_len, seed)
        target.seconds(prompts, [WARM_UP] * case.batch)
        samples = []
        for number in range(repetitions):
            watch(f"{case.name}, batch {case.batch}, {number + 1}/{repetitions}")
            seconds = (_prefill if case.prompt else _step)(target, case, prompts)
            if seconds > 0:
                samples.append(seconds)
        yield _micro_row(target, case, samples, repetitions, limits) | {"seed": seed}


def latency(
    target: Target,
    work: Workload,
    *,
    warm_ups: int,
    repetitions: int,
    limits: Limits,
    seed: int,
    watch: Watch,
) -> Row:
    """Seconds of a whole batch of equal requests, with other prompts each time."""
    count, length, new = len(work.prompts), len(work.prompts[0]), work.output_tokens[0]
    samples = []
    for number in range(-warm_ups, repetitions):
        prompts = _prompts(target, count, length, seed + max(0, number))
        watch(f"{work.name}, batch {count}, {max(0, number + 1)}/{repetitions}")
        seconds = target.seconds(prompts, work.output_tokens)
        if number >= 0:
            samples.append(seconds)
    row = {
        "test": work.name, "batch_size": count, "input_len": length, "output_len": new,
        "repetitions": repetitions, "warm_ups": warm_ups, "seed": seed,
        "avg_latency": mean(samples), "latencies": samples,
        "percentiles": {str(p): percentile(samples, p) for p in (10, 25, 50, 75, 90, 99)},
        "median_ms": 1e3 * median(samples), "p10_ms": 1e3 * percentile(samples, 10),
        "p90_ms": 1e3 * percentile(samples, 90),
        "output_throughput": count * new / median(samples),
    }  # fmt: skip
    return row | _offline(target, [(length, new)] * count, median(samples), limits)


def throughput(
    target: Target, work: Workload, repetitions: int, limits: Limits, watch: Watch
) -> Row:
    """All requests of a workload at once: requests and tokens a second, and how the engine ran."""
    prompts = list(work.within(target.model.vocab_size).prompts)
    watch(f"{work.name}, warming up")
    target.seconds(prompts[:1], [min(WARM_UP, work.output_tokens[0])])
    before, samples = target.llm.stats(), []
    for number in range(repetitions):
        watch(f"{work.name}, {number + 1}/{repetitions}")
        samples.append(target.seconds(prompts, work.output_tokens))
    after = target.llm.stats()
    lengths = [(len(o.prompt_token_ids), len(o.token_ids)) for o in target.last]
    total_in, total_out = sum(i for i, _ in lengths), sum(o for _, o in lengths)
    elapsed = median(samples)
    steps = max(1, after.steps - before.steps)
    row = {
        "test": work.name, "num_requests": len(lengths), "repetitions": repetitions,
        "total_input_tokens": total_in, "total_output_tokens": total_out,
        "total_num_tokens": total_in + total_out,
        "elapsed_time": elapsed, "samples_s": samples,
        "p10_s": percentile(samples, 10), "p90_s": percentile(samples, 90),
        "requests_per_second": len(lengths) / elapsed,
        "tokens_per_second": (total_in + total_out) / elapsed,
        "output_throughput": total_out / elapsed,
        "steps": steps // repetitions, "ms_per_step": 1e3 * sum(samples) / steps,
        "mean_batch": (after.generated_tokens - before.generated_tokens) / steps,
        "preemptions": after.preemptions - before.preemptions,
        "prefix_hit_tokens": after.prefix_hit_tokens - before.prefix_hit_tokens,
    }  # fmt: skip
    return row | _offline(target, lengths, elapsed, limits)


def _prompts(target: Target, count: int, length: int, seed: int) -> list[list[int]]:
    return [inside(ids, target.model.vocab_size) for ids in fixed(count, length, seed)]


def _prefill(target: Target, case: Case, prompts: list[list[int]]) -> float:
    """Seconds for the prompt alone: with depth, what it takes longer than the depth."""
    one = [1] * case.batch
    whole = target.seconds(prompts, one)
    if not case.depth:
        return whole
    return whole - target.seconds([ids[: case.depth] for ids in prompts], one)


def _step(target: Target, case: Case, prompts: list[list[int]]) -> float:
    """Seconds of one step of `case.new`, from two runs that differ by so many."""
    short = target.seconds(prompts, [SETTLE] * case.batch)
    long = target.seconds(prompts, [SETTLE + case.new] * case.batch)
    return (long - short) / case.new


def _micro_row(
    target: Target, case: Case, samples: list[float], repetitions: int, limits: Limits
) -> Row:
    if not samples:
        raise KvrunError(
            f"{case.name}, batch {case.batch}: every difference measured is below zero.",
            cause="what else runs on this machine weighs more than the test",
            hint="close other programs, or make the test longer: -n 128 -r 10",
        )
    rates = [case.batch * (case.prompt or 1) / seconds for seconds in samples]
    if case.prompt:
        work = target.cost.prefill(case.batch, case.prompt, case.depth)
    else:
        work = target.cost.step(case.batch, case.prompt_len + SETTLE + case.new / 2)
    milliseconds = [1e3 * seconds for seconds in samples]
    return {
        "test": case.name, "n_prompt": case.prompt, "n_gen": case.new, "n_depth": case.depth,
        "batch_size": case.batch, "repetitions": repetitions,
        "dropped": repetitions - len(samples),  # differences below zero
        "avg_ts": mean(rates), "stddev_ts": deviation(rates), "samples_ts": rates,
        "median_ms": median(milliseconds), "p10_ms": percentile(milliseconds, 10),
        "p90_ms": percentile(milliseconds, 90), "samples_ms": milliseconds,
        **limits.beside(work, median(samples)),
    }  # fmt: skip


def _offline(target: Target, lengths: list[tuple[int, int]], seconds: float, limits: Limits) -> Row:
    slots, room = target.ready.max_num_seqs, target.ready.kv_tokens

    def bound(at: Ceilings | None) -> float | None:
        return target.cost.offline(lengths, at, slots=slots, kv_tokens=room) if at else None

    return shares(bound(limits.measured), bound(limits.datasheet), seconds)
