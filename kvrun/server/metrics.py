"""Metrics: Prometheus text under Text Generation Inference's names, vLLM's and our own."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics
from prometheus_client.exposition import generate_latest

from kvrun.runtime.engine.request import AdapterInfo, Ready, Seconds, Stats

DURATIONS = Seconds.BOUNDS
MAX_BATCH = 1024  # the largest bucket of sizes
LATENCIES = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

disable_created_metrics()  # type: ignore[no-untyped-call]  # dashboards do not know them


class LoraUse(NamedTuple):
    """The adapters that are known, those in use by what runs and by what waits, and the time."""

    infos: Sequence[AdapterInfo]
    running: set[str]
    waiting: set[str]
    now: int


class Metrics:
    """Counts what happens over HTTP; what happens in the engine comes in with `text`."""

    def __init__(self) -> None:
        self.requests = 0
        self.succeeded = 0
        self.restarts = 0
        self.failures: Counter[str] = Counter()  # by err, in TGI's words
        self.finished: Counter[str] = Counter()  # answers, by finish reason
        self.adapter_requests: Counter[str] = Counter()
        self.adapter_tokens: Counter[str] = Counter()
        self._registry = CollectorRegistry()
        self.duration = self._times("duration", "Seconds from arrival to end")
        self.validation = self._times("validation_duration", "Seconds of checks and tokenizing")
        self.queue = self._times("queue_duration", "Seconds from then to the first token")
        self.inference = self._times("inference_duration", "Seconds from first to last token")
        self.per_token = self._times("mean_time_per_token_duration", "Mean seconds between tokens")
        self.first_token = self._latency("time_to_first_token_seconds", "Until the first token")
        self.inter_token = self._latency("inter_token_latency_seconds", "Between tokens")
        self.whole = self._latency("e2e_request_latency_seconds", "Of whole requests")

    def set_sizes(self, max_input: int, max_total: int) -> None:
        """Make the histograms whose buckets follow the model's sizes; nothing ends before."""
        self.input_length = self._sizes("input_length", "Prompt tokens", max_input)
        self.generated_tokens = self._sizes("generated_tokens", "Generated tokens", max_total)
        self.max_new_tokens = self._sizes("max_new_tokens", "Tokens asked for", max_total)
        self.skipped_tokens = Histogram(
            "tgi_request_skipped_tokens",
            "Tokens accepted from guesses in one step, less one",
            buckets=range(16),
            registry=self._registry,
        )

    def text(
        self, stats: Stats, ready: Ready | None, *, model: str, log_errors: int, lora: LoraUse
    ) -> bytes:
        """Everything, as Prometheus reads it."""
        engine = _engine(stats, ready, model, log_errors)
        lines = [
            *self._counters(), *engine, *_steps(stats), *_lora(lora), *self._ours(model)
        ]  # fmt: skip
        return "".join(lines).encode() + generate_latest(self._registry)

    def _counters(self) -> Iterator[str]:
        # Written by hand: the library would append _total to these names.
        yield from _metric("tgi_request_count", "counter", "Requests", {"": self.requests})
        yield from _metric("tgi_request_success", "counter", "Completed", {"": self.succeeded})
        failures = {_labels(err=err): count for err, count in self.failures.items()}
        yield from _metric("tgi_request_failure", "counter", "Failed", failures)

    def _ours(self, model: str) -> Iterator[str]:
        help = "Engine processes that died and were started again"
        yield from _metric("kvrun_engine_restarts_total", "counter", help, {"": self.restarts})
        finished = {
            _labels(model_name=model, finished_reason=reason): count
            for reason, count in self.finished.items()
        }
        yield from _metric("vllm:request_success_total", "counter", "Answers", finished)
        for name, counts in (
            ("requests", self.adapter_requests),
            ("generated_tokens", self.adapter_tokens),
        ):
            by_adapter = {_labels(adapter=adapter): n for adapter, n in counts.items()}
            help = f"{name.replace('_', ' ')} by adapter; '' is the base"
            yield from _metric(f"kvrun_adapter_{name}_total", "counter", help, by_adapter)

    def _times(self, name: str, help: str) -> Histogram:
        return Histogram(f"tgi_request_{name}", help, buckets=DURATIONS, registry=self._registry)

    def _sizes(self, name: str, help: str, most: int) -> Histogram:
        buckets = [most * step / 100 for step in range(1, 101)]
        return Histogram(f"tgi_request_{name}", help, buckets=buckets, registry=self._registry)

    def _latency(self, name: str, help: str) -> Histogram:
        return Histogram(f"vllm:{name}", help, buckets=LATENCIES, registry=self._registry)


def _engine(stats: Stats, ready: Ready | None, model: str, log_errors: int) -> Iterator[str]:
    size = ready.block_size if ready else 0
    used = stats.blocks_active / stats.blocks_total if stats.blocks_total else 0.0
    idle = not stats.running and not stats.waiting
    named = _labels(model_name=model)
    for name, kind, help, label, value in (
        ("tgi_queue_size", "gauge", "Answers that wait", "", stats.waiting),
        ("tgi_batch_current_size", "gauge", "Answers that run", "", stats.running),
        ("tgi_batch_current_max_tokens", "gauge", "Tokens in use", "", stats.blocks_active * size),
        ("tgi_batch_max_total_tokens", "gauge", "Tokens of the cache", "",
         ready.kv_tokens if ready else 0),
        ("vllm:num_requests_running", "gauge", "Answers that run", named, stats.running),
        ("vllm:num_requests_waiting", "gauge", "Answers that wait", named, stats.waiting),
        ("vllm:kv_cache_usage_perc", "gauge", "Share of the cache in use", named, used),
        ("vllm:prompt_tokens_total", "counter", "Computed", named, stats.prompt_tokens),
        ("vllm:generation_tokens_total", "counter", "Generated", named, stats.generated_tokens),
        ("vllm:prefix_cache_hits_total", "counter", "Tokens", named, stats.prefix_hit_tokens),
        ("vllm:num_preemptions_total", "counter", "Preemptions", named, stats.preemptions),
        ("kvrun_kv_blocks_used", "gauge", "Blocks of the cache in use", "", stats.blocks_active),
        ("kvrun_kv_blocks_total", "gauge", "Blocks of the cache", "", stats.blocks_total),
        ("kvrun_kv_page_leak", "gauge", "Blocks in use by nobody; must be 0", "",
         stats.blocks_active if idle else 0),
        ("kvrun_log_errors_total", "counter", "Lines not written", "", log_errors),
    ):  # fmt: skip
        yield from _metric(name, kind, help, {label: value})


def _steps(stats: Stats) -> Iterator[str]:
    """Steps, those with tokens of prompts as "prefill", and how many sequences they have held."""
    times = {"prefill": stats.prompt_steps, "decode": stats.decode_steps}
    succeeded = {_labels(method=name): sum(t.counts) for name, t in times.items()}
    yield from _metric("tgi_batch_inference_success", "counter", "Steps that landed", succeeded)
    # Whose tokens were to blame is not known.
    failed = {_labels(method="decode"): stats.failed_steps}
    yield from _metric("tgi_batch_inference_failure", "counter", "Steps that raised", failed)
    tried = {label: count + failed.get(label, 0) for label, count in succeeded.items()}
    yield from _metric("tgi_batch_inference_count", "counter", "Steps", tried)
    help = "Seconds of a step, until its tokens are on the host"
    yield _head("tgi_batch_inference_duration", "histogram", help)
    for name, seconds in times.items():
        yield from _buckets(
            "tgi_batch_inference_duration", {"method": name}, Seconds.BOUNDS, seconds.counts,
            seconds.sum,
        )  # fmt: skip
    sizes = stats.step_sizes
    counts = [sizes.get(size, 0) for size in range(1, MAX_BATCH + 1)]
    counts.append(sum(count for size, count in sizes.items() if size > MAX_BATCH))
    yield _head("tgi_batch_next_size", "histogram", "Answers in a step")
    total = float(sum(size * count for size, count in sizes.items()))
    bounds = [float(size) for size in range(1, MAX_BATCH + 1)]
    yield from _buckets("tgi_batch_next_size", {}, bounds, counts, total)


def _buckets(
    name: str, labels: Mapping[str, str], bounds: Sequence[float], counts: Sequence[int], sum: float
) -> Iterator[str]:
    """A histogram's samples; `counts` has one more than `bounds`."""
    reached = 0
    for bound, count in zip([*(repr(bound) for bound in bounds), "+Inf"], counts, strict=True):
        reached += count
        yield f"{name}_bucket{_labels(**labels, le=bound)} {reached}\n"
    shown = _labels(**labels) if labels else ""
    yield f"{name}_sum{shown} {sum}\n{name}_count{shown} {reached}\n"


def _lora(use: LoraUse) -> Iterator[str]:
    labels = _labels(
        max_lora=str(len(use.infos)),
        running_lora_adapters=",".join(sorted(use.running)),
        waiting_lora_adapters=",".join(sorted(use.waiting)),
    )
    help = "Adapters that run and wait; the value is when this was true"
    yield from _metric("vllm:lora_requests_info", "gauge", help, {labels: use.now})
    seconds = {
        _labels(adapter=info.name): info.load_seconds
        for info in use.infos
        if info.load_seconds is not None
    }
    help = "Seconds it took to read an adapter"
    yield from _metric("kvrun_adapter_load_seconds", "gauge", help, seconds)


def _metric(name: str, kind: str, help: str, values: Mapping[str, float]) -> Iterator[str]:
    yield _head(name, kind, help)
    for labels, value in values.items():
        yield f"{name}{labels} {value}\n"


def _head(name: str, kind: str, help: str) -> str:
    return f"# HELP {name} {help}\n# TYPE {name} {kind}\n"


def _labels(**values: str) -> str:
    escaped = (
        (name, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n"))
        for name, value in values.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
