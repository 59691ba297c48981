"""A server under load: from its URL to a row of figures; `kvrun bench load`."""

import asyncio
import platform
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kvrun import __version__
from kvrun.bench import load, report
from kvrun.bench.completions import Asker, Outcome, Route, first_model
from kvrun.bench.load import Run
from kvrun.bench.progress import Work, note
from kvrun.bench.report import Report
from kvrun.bench.table import Row, number
from kvrun.bench.workloads import Workload
from kvrun.errors import InvalidRequest, KvrunError
from kvrun.http import Client


@dataclass(frozen=True)
class Load:
    """What is done to which server: `rate` requests a second, or else `concurrency` clients."""

    route: Route
    model: str | None
    api_key: str | None
    concurrency: int
    rate: float | None
    ignore_eos: bool
    timeout: float
    seed: int
    slo: dict[str, float]

    def __post_init__(self) -> None:
        if self.rate is not None and not self.rate > 0:
            raise InvalidRequest(f"--rate is {self.rate}; it must be above 0.")
        if not self.timeout > 0:
            raise InvalidRequest(f"--timeout is {self.timeout}; it must be above 0.")


def measure(plan: Load, work: Workload, out: Report, shown: bool) -> None:
    """Run the load and report it, what has ended too when Ctrl+C ends it.

    Raises Unreachable, NotFound, InvalidRequest before the load, and KvrunError when no request
    has succeeded.
    """
    run, found = Run(), {"model_id": plan.model or ""}
    with Work(total=len(work.prompts), shown=shown) as line:
        try:
            asyncio.run(_run(plan, work, run, line, found))
        finally:
            line.stop()
            if run.outcomes:
                row = {**load.summary(run, plan.slo), **_asked(plan, work)}
                _show(row, run, {**_about(plan), **found}, out)
    if run.outcomes and all(outcome.error for outcome in run.outcomes):
        raise KvrunError("no request has succeeded.", cause=run.outcomes[0].error)


async def _run(plan: Load, work: Workload, run: Run, line: Work, found: dict[str, str]) -> None:
    client = Client(plan.route.address, api_key=plan.api_key)
    try:
        model = plan.model or await first_model(client, plan.route)
        found["model_id"] = model
        asker = Asker(client, plan.route, model, plan.ignore_eos, plan.timeout)
        await load.check(asker, work.prompts[0])

        def done(outcome: Outcome) -> None:
            failed = sum(bool(one.error) for one in run.outcomes)
            line.say(f"{len(run.outcomes)}/{len(work.prompts)} requests, {failed} failed")

        if plan.rate is None:
            await load.closed(asker, work, plan.concurrency, run, done)
        else:
            await load.opened(asker, work, plan.rate, plan.seed, run, done)
    finally:
        client.close()


def _asked(plan: Load, work: Workload) -> Row:
    return {
        "test": work.name,
        "num_prompts": len(work.prompts),
        "request_rate": plan.rate,
        "max_concurrency": plan.concurrency if plan.rate is None else None,
        "seed": plan.seed,
        "ignore_eos": plan.ignore_eos,
        "prompts_as": "text" if work.has_text else "ids",
        "output_tokens_asked": work.total_output,
    }


def _about(plan: Load) -> dict[str, Any]:
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "backend": "openai-chat" if plan.route.chat else "openai",
        "base_url": str(plan.route.address),
        "endpoint": plan.route.path,
        "sampling": "greedy",
        "versions": {"kvrun": __version__, "python": platform.python_version()},
    }


def _show(row: Row, run: Run, about: dict[str, Any], out: Report) -> None:
    for line in failures(row["errors"]):
        note(line)
    if row["ignore_eos"] and row["short_answers"]:
        note(f"{row['short_answers']} answers {SHORT}")
    if out.form not in ("table", "md"):
        out.show(report.LOAD, [row], about)
        return
    good = [outcome for outcome in run.outcomes if not outcome.error]
    rows = [{"name": NAMES[name], **values} for name, values in load.spreads(good).items()]
    out.show(report.LOAD, rows, about, above=_lines(row, about) + "\n", drawn=[row])


def failures(errors: dict[str, int]) -> list[str]:
    """Lines of what went wrong how often: the most frequent errors, where each may be its own."""
    lines = [f"failed {count} times: {error}" for error, count in errors.items()]
    rest = sum(list(errors.values())[SAID:])
    return lines[:SAID] + ([f"failed {rest} times in other ways"] if rest else [])


SAID = 3
SHORT = "have fewer tokens than asked for: no room in the server's context, or no ignore_eos there"
NAMES = {
    "ttft": "time to first token",
    "tpot": "time per token after it",
    "itl": "between pieces of text",
    "e2el": "whole request",
}


def _lines(row: Row, about: dict[str, Any]) -> str:
    how = f"{row['max_concurrency']} clients in a closed loop"
    if row["request_rate"] is not None:
        how = f"{row['request_rate']:g} requests/s, Poisson"
    lines = [
        f"{about['model_id']} at {about['base_url']}{about['endpoint']}: {row['test']}, {how}",
        f"{row['completed']} of {row['num_prompts']} requests succeeded, {row['failed']} failed, "
        f"in {number(row['duration'], 3)} s; {number(row['mean_concurrency'], 3)} at once on "
        f"average, {row['max_concurrent_requests']} at most",
        f"{number(row['request_throughput'])} requests/s, {number(row['output_throughput'])} "
        f"output tok/s, {number(row['total_token_throughput'])} total tok/s; tokens counted by "
        f"{row['tokens_by']}: {row['total_input_tokens']:,} in, {row['total_output_tokens']:,} out",
    ]
    if row["total_cached_tokens"]:
        lines[-1] += f"; {row['total_cached_tokens']:,} of those in were in the server's cache"
    if "slo_ms" in row:
        bounds = ", ".join(f"{name} <= {number(ms)} ms" for name, ms in row["slo_ms"].items())
        lines.append(
            f"goodput {number(row['request_goodput'])} requests/s: {row['good_requests']} requests "
            f"with {bounds}"
        )
    return "\n".join(lines)
