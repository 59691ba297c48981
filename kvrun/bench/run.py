"""The runs of `kvrun bench`: open what is measured, measure, report; also what Ctrl+C leaves."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kvrun.bench import hardware, measure, report
from kvrun.bench import lora as adapted
from kvrun.bench.hardware import Hardware
from kvrun.bench.limits import Limits
from kvrun.bench.measure import SETTLE, Case, Watch
from kvrun.bench.progress import Work, note
from kvrun.bench.rates import BANDWIDTH, FLOPS, Rate
from kvrun.bench.report import Kind, Report
from kvrun.bench.table import Row
from kvrun.bench.target import Target, find, gpu_state, parse_engine, versions
from kvrun.bench.workloads import Workload
from kvrun.errors import InvalidRequest

USUAL_SEQS = 256


@dataclass(frozen=True)
class Subject:
    """The model to be measured: a name or a shape, and how its engine is started."""

    name: str | None
    shape: str | None
    random: bool
    options: dict[str, Any]  # of LLM
    threads: int | None
    roofline: bool

    @classmethod
    def of(
        cls,
        name: str | None,
        shape: str | None,
        random: bool,
        *,
        engine: Sequence[str],
        threads: int | None,
        roofline: bool,
        **options: Any,
    ) -> "Subject":
        """From what a command line says; options that are None are left to the engine.

        Prompts are all different: the prefix cache is off unless it is asked for. Raises
        InvalidRequest.
        """
        chosen = {key: value for key, value in options.items() if value is not None}
        if threads is not None:
            chosen["threads"] = threads
        chosen = {"prefix_caching": False, **chosen}
        return cls(name, shape, random, chosen | parse_engine(engine), threads, roofline)

    def sized(self, longest: int | None, batch: int | None = None) -> dict[str, Any]:
        """The options, with a context and places for `batch` sequences of `longest` tokens."""
        options = dict(self.options)
        if batch is not None:
            places = options.setdefault("max_num_seqs", max(batch, USUAL_SEQS))
            if places < batch:
                raise InvalidRequest(
                    f"{batch} sequences do not run at once with max_num_seqs={places}."
                )
        if longest is not None:
            options.setdefault("max_model_len", longest)
        return options


def micro(
    subject: Subject, todo: Sequence[Case], repetitions: int, seed: int, out: Report, shown: bool
) -> None:
    """`kvrun bench micro`."""
    if not todo:
        raise InvalidRequest("-p and -n are both 0: there is nothing to measure.")
    options = subject.sized(max(c.longest for c in todo), max(c.batch for c in todo))

    def rows(target: Target, limits: Limits, watch: Watch) -> Iterator[Row]:
        room = target.ready.kv_tokens
        for case in todo:
            if case.batch * case.longest > room:
                note(
                    f"note: the cache holds {room:,} tokens; in {case.name}, batch {case.batch}, "
                    "some wait or are preempted"
                )
        return measure.micro(target, todo, repetitions, limits, seed, watch)

    _on_model(subject, options, report.MICRO, rows, len(todo) * repetitions, out, shown)


def latency(
    subject: Subject,
    work: Workload,
    *,
    warm_ups: int,
    repetitions: int,
    seed: int,
    out: Report,
    shown: bool,
) -> None:
    """`kvrun bench latency`."""
    options = subject.sized(work.longest, len(work.prompts))

    def rows(target: Target, limits: Limits, watch: Watch) -> Iterator[Row]:
        yield measure.latency(
            target, work, warm_ups=warm_ups, repetitions=repetitions, limits=limits, seed=seed,
            watch=watch,
        )  # fmt: skip

    _on_model(subject, options, report.LATENCY, rows, warm_ups + repetitions, out, shown)


def throughput(
    subject: Subject,
    todo: Sequence[Workload],
    repetitions: int,
    seed: int,
    out: Report,
    shown: bool,
) -> None:
    """`kvrun bench throughput`."""
    # How long texts are is known to the tokenizer alone; then the context is what fits.
    known = not any(work.has_text for work in todo)
    options = subject.sized(max(work.longest for work in todo) if known else None)

    def rows(target: Target, limits: Limits, watch: Watch) -> Iterator[Row]:
        for work in todo:
            yield measure.throughput(target, work, repetitions, limits, watch) | {"seed": seed}

    total = len(todo) * (repetitions + 1)
    _on_model(subject, options, report.THROUGHPUT, rows, total, out, shown)


def lora(
    subject: Subject,
    batches: Sequence[int],
    works: Sequence[Workload],
    kinds: Sequence[str],
    *,
    adapters: dict[str, str],
    prompt: int,
    new: int,
    repetitions: int,
    seed: int,
    out: Report,
    shown: bool,
) -> None:
    """`kvrun bench lora`: steps of batches, or workloads if there are any."""
    longest = max([prompt + SETTLE + new, *(work.longest for work in works)])
    options = subject.sized(longest, None if works else max(batches))
    options["adapters"] = adapters
    how: dict[str, Any] = {"repetitions": repetitions, "seed": seed}

    def rows(target: Target, limits: Limits, watch: Watch) -> Iterator[Row]:
        adapted.check_targets(target)
        more: dict[str, Any] = {**how, "limits": limits, "watch": watch}
        if not works:
            yield from adapted.steps(target, batches, kinds, prompt=prompt, new=new, **more)
        for work in works:
            yield from adapted.throughput(target, work, kinds, **more)

    total = len(works or batches) * (len(kinds) + 1) * (repetitions + 1)
    _on_model(subject, options, report.LORA, rows, total, out, shown, lines=bool(works))


def machine(device: str, threads: int | None, out: Report, shown: bool) -> None:
    """`kvrun bench hw`: measure the ceilings anew, and keep them for the other commands."""
    with _threads(threads), Work(shown=shown) as work:
        before = gpu_state(hardware.here(device).device)
        found = hardware.measured(device, watch=work.say)
    dtype = "bfloat16"
    about = {
        **found.record(), "versions": versions(), "gpu": before,
        "gpu_after": gpu_state(found.device),
    }  # fmt: skip
    del about["rates"]
    rows = [{**vars(r), "shown": r.shown, **_of_datasheet(found, r, dtype)} for r in found.rates]
    out.show(report.HARDWARE, rows, about, above=found.line(dtype))


def _on_model(
    subject: Subject,
    options: dict[str, Any],
    kind: Kind,
    rows: Callable[[Target, Limits, Watch], Iterator[Row]],
    total: int,
    out: Report,
    shown: bool,
    lines: bool = False,
) -> None:
    device = options.get("device", "auto")
    with (
        _threads(subject.threads),
        find(subject.name, subject.shape, random=subject.random) as model,
    ):
        if model.why:
            note(f"note: {model.why}")
        with Work(total=total, shown=shown, lines=lines) as work:
            found = None
            if subject.roofline:
                found = hardware.known(device, watch=lambda text: note(f"limits: {text}"))
            with Target(model, **options) as target:
                ready = target.ready
                weights = "random weights" if model.random else "real weights"
                note(
                    f"{model.name}, {weights}, {ready.dtype} on {ready.device}, attention "
                    f"{ready.attention}; {ready.plan}; ready after {target.start_seconds:.1f} s"
                )
                about, limits = target.about(found), Limits()
                if found:
                    limits = Limits(found.ceilings(ready.dtype), found.promised(ready.dtype))
                    note(f"limits: {found.line(ready.dtype)}")
                _collect(kind, rows(target, limits, work.say), about, out, work)


def _collect(
    kind: Kind, rows: Iterator[Row], about: dict[str, Any], out: Report, work: Work
) -> None:
    """Show the rows, those too that come before an error or Ctrl+C ends them."""
    got: list[Row] = []
    try:
        for row in rows:
            got.append(row)  # noqa: PERF402 - what has come is kept when the next one fails
    finally:
        work.stop()
        about["gpu_after"] = gpu_state(about["device"])
        if got:
            out.show(kind, got, about)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise InvalidRequest(f"--threads is {count}; it must be at least 1.")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _of_datasheet(found: Hardware, rate: Rate, dtype: str) -> dict[str, float | None]:
    promised = found.promised(dtype)
    share = None
    if promised and rate.unit == BANDWIDTH:
        share = 100 * rate.value / promised.bandwidth
    if promised and rate.unit == FLOPS and rate.name == dtype:
        share = 100 * rate.value / promised.flops
    return {"datasheet_percent": share}
