"""Load: many requests to one server, in a closed loop or at random times, and what they tell."""

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from kvrun.bench.completions import Asker, Outcome, refused, unreachable
from kvrun.bench.spread import deviation, mean, median, percentile
from kvrun.bench.workloads import Prompt, Workload
from kvrun.errors import InvalidRequest

METRICS = ("ttft", "tpot", "itl", "e2el")
_SLO = re.compile(r"\s*(\w+)\s*=\s*([0-9.]+)\s*(ms|s|)\s*")
# Of about one token each in most vocabularies.
WORDS = (
    "the of and to in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find"
)


@dataclass
class Run:
    """Outcomes as they come in; what has not ended when a run is broken off is not among them."""

    outcomes: list[Outcome] = field(default_factory=list)
    begun: float = 0.0
    ended: float = 0.0
    running: int = 0
    most_running: int = 0


async def check(asker: Asker, prompt: Prompt) -> None:
    """One request that does not count. Raises what a user can do something about.

    It asks for the prompt the other way round: servers keep the beginnings of prompts, and `prompt`
    itself would then cost next to nothing when it counts.
    """
    outcome = await asker.ask(turned(prompt), 2)
    if not outcome.error:
        return
    if not outcome.reached:
        raise unreachable(asker.client.address, outcome.error)
    raise refused(outcome.error, f"{asker.client.address}{asker.route.path}")


def turned(prompt: Prompt) -> Prompt:
    """The same ids, or words, from the last one to the first."""
    if isinstance(prompt, str):
        return " ".join(reversed(prompt.split())) or prompt
    return prompt[::-1]


async def closed(
    asker: Asker, work: Workload, concurrency: int, run: Run, done: Callable[[Outcome], None]
) -> None:
    """`concurrency` clients, each of which asks again as soon as it has its answer."""
    requests = work.requests()

    async def client() -> None:
        for prompt, output_tokens in requests:
            await _one(asker, prompt, output_tokens, run, done)

    run.begun = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(min(concurrency, len(work.prompts)))))


async def opened(
    asker: Asker, work: Workload, rate: float, seed: int, run: Run, done: Callable[[Outcome], None]
) -> None:
    """`rate` requests a second on average, at times of a Poisson process, whoever still waits."""
    random, tasks = Random(seed), []
    due = run.begun = time.perf_counter()
    try:
        for prompt, output_tokens in work.requests():
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(_one(asker, prompt, output_tokens, run, done)))
            due += random.expovariate(rate)
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _one(
    asker: Asker, prompt: Prompt, output_tokens: int, run: Run, done: Callable[[Outcome], None]
) -> None:
    run.running += 1
    run.most_running = max(run.most_running, run.running)
    try:
        outcome = await asker.ask(prompt, output_tokens)
    finally:
        run.running -= 1
    run.outcomes.append(outcome)
    run.ended = time.perf_counter()
    done(outcome)


def summary(run: Run, slo: dict[str, float]) -> dict[str, Any]:
    """Counts, rates and the spread of every metric, by the names vLLM's benchmark gives them.

    Times are milliseconds. Rates are over the time from the first request to the last answer.
    `request_goodput` counts requests that keep every bound of `slo` (metric -> seconds).
    """
    good = [outcome for outcome in run.outcomes if not outcome.error]
    duration = max(run.ended - run.begun, 1e-9)
    output = sum(outcome.output_tokens for outcome in good)
    total = output + sum(outcome.input_tokens for outcome in good)
    found: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(run.outcomes) - len(good),
        "errors": dict(Counter(o.error for o in run.outcomes if o.error).most_common()),
        "total_input_tokens": total - output,
        "total_cached_tokens": sum(outcome.cached_tokens for outcome in good),
        "total_output_tokens": output,
        "short_answers": sum(outcome.short for outcome in good),
        "tokens_by": _counted(good),
        "request_throughput": len(good) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": total / duration,
        "max_concurrent_requests": run.most_running,
        "mean_concurrency": sum(outcome.e2el for outcome in good) / duration,
    }
    if slo:
        kept = sum(all(_keeps(outcome, *bound) for bound in slo.items()) for outcome in good)
        found["slo_ms"] = {name: 1e3 * bound for name, bound in slo.items()}
        found["good_requests"] = kept
        found["request_goodput"] = kept / duration
    for name, values in spreads(good).items():
        for key, value in values.items():
            found[f"{key}_{name}_ms"] = value
    return found


def spreads(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """For each metric the mean, deviation and percentiles of all requests, in milliseconds."""
    found = {}
    for name in METRICS:
        values = [1e3 * value for outcome in outcomes for value in _values(outcome, name)]
        found[name] = {
            "mean": mean(values), "std": deviation(values), "median": median(values),
            "p90": percentile(values, 90), "p99": percentile(values, 99),
            "max": max(values, default=float("nan")),
        }  # fmt: skip
    return found


def parse_slo(text: str) -> dict[str, float]:
    """From ttft=200ms,tpot=0.05s to seconds by metric; a bare number is milliseconds.

    Raises InvalidRequest.
    """
    found = {}
    for part in filter(None, text.split(",")):
        match = _SLO.fullmatch(part)
        name = {"e2e": "e2el"}.get(match[1], match[1]) if match else ""
        try:
            bound = float(match[2]) if match else 0.0
        except ValueError:
            bound = 0.0
        if match is None or name not in METRICS or bound <= 0:
            raise InvalidRequest(
                f"--slo: '{part}' is no bound.", hint="ttft=200,tpot=50,e2e=10s; numbers are ms"
            )
        found[name] = bound if match[3] == "s" else bound / 1e3
    return found


def as_text(work: Workload, seed: int) -> Workload:
    """The same lengths in common words, for servers that take no token ids."""
    random = Random(seed)
    texts = [
        prompt
        if isinstance(prompt, str)
        else " ".join(random.choices(WORDS.split(), k=len(prompt)))
        for prompt in work.prompts
    ]
    return Workload(work.name, texts, work.output_tokens)


def _values(outcome: Outcome, name: str) -> Iterable[float]:
    if name == "itl":
        return outcome.itl
    value = getattr(outcome, name)
    return [] if value is None else [value]


def _keeps(outcome: Outcome, name: str, bound: float) -> bool:
    values = list(_values(outcome, name))
    # Of many gaps their mean counts: a bound on each would be another one for long answers.
    return not values or mean(values) <= bound


def _counted(good: Sequence[Outcome]) -> str:
    by_usage = sum(outcome.by_usage for outcome in good)
    if by_usage == len(good):
        return "usage"
    return "pieces of text" if not by_usage else "usage, or pieces of text where there is none"
