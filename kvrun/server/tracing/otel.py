"""Spans over OTLP: one for each request, under TGI's names, and what it has waited for inside."""

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import fields
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import Scope

from kvrun.errors import InvalidRequest
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.server.call import Call

ROUTES = {
    "/": "compat_generate", "/generate": "generate", "/generate_stream": "generate_stream",
    "/invocations": "invocations", "/v1/chat/completions": "chat_completions",
    "/v1/completions": "completions", "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
}  # fmt: skip
TIMEOUT = 5.0  # seconds that a collector may take
LAST_WORDS = 2.0  # seconds for what has not been sent when the server ends
_LONG = ("stop", "logit_bias", "stop_token_ids")
_HEADERS = ("traceparent", "tracestate")


def to_collector(endpoint: str) -> SpanProcessor:
    """Sends spans to a collector in the background. Raises InvalidRequest for no http(s) URL."""
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise InvalidRequest(
            f"--otlp-endpoint is '{endpoint}'.", hint="OTLP over HTTP: http://localhost:4318"
        )
    url = endpoint if parts.path.strip("/") else endpoint.rstrip("/") + "/v1/traces"
    return BatchSpanProcessor(OTLPSpanExporter(endpoint=url, timeout=TIMEOUT))


class Tracing:
    """Makes the spans of a request once it has ended: nothing is done while it runs."""

    def __init__(self, processor: SpanProcessor, service_name: str) -> None:
        resource = Resource.create({SERVICE_NAME: service_name})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("kvrun")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, scope: Scope, call: Call) -> None:
        """The spans of a request that has ended now, if it was one for the model."""
        name = ROUTES.get(call.path)
        if name is None or scope["method"] != "POST":
            return
        ended = time.time_ns()
        elapsed = time.perf_counter()

        def at(moment: float) -> int:
            return ended - int((elapsed - moment) * 1e9)

        context = self._propagator.extract(_carrier(scope))
        span = self._tracer.start_span(
            name, context, SpanKind.SERVER, _attributes(call), start_time=at(call.began)
        )
        if call.gone or call.error or call.status != 200:
            why = "the client has left" if call.gone else call.error or str(call.status)
            span.set_status(Status(StatusCode.ERROR, why))
        inside = set_span_in_context(span)
        for timing in call.timings:
            moments = [call.began, timing.sent, timing.first, timing.last]
            for child, start, end in zip(
                ("validate", "queued", "infer"), moments, moments[1:], strict=False
            ):
                if end:
                    begun = self._tracer.start_span(child, inside, start_time=at(start))
                    begun.end(at(end))
        span.end(ended)

    def close(self) -> None:
        """Send what has not been sent, for as long as that may take."""
        last = threading.Thread(target=self._provider.shutdown, daemon=True, name="otlp")
        last.start()
        last.join(LAST_WORDS)


def _carrier(scope: Scope) -> Mapping[str, str]:
    headers = (
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
    )
    return {name: value for name, value in headers if name in _HEADERS}


def _attributes(call: Call) -> dict[str, str | int]:
    """TGI's, with its words for times; and LoRAX's counts. Nothing of any text."""
    found: dict[str, str | int] = {
        "http.request.method": "POST", "url.path": call.path,
        "http.response.status_code": call.status, "kvrun.request_id": call.id,
        "total_time": shown(call.seconds),
    }  # fmt: skip
    if not call.timings:
        return found
    one = call.timings[0]
    found["parameters"] = parameters(one.params)
    found["validation_time"] = shown(one.sent - call.began)
    if one.params.seed is not None:
        found["seed"] = one.params.seed
    if one.adapter is not None:
        found["adapter_id"] = one.adapter
    found["prompt_tokens"] = sum(timing.prompt_tokens for timing in call.timings)
    found["generated_tokens"] = sum(timing.tokens for timing in call.timings)
    if one.first:
        found["queue_time"] = shown(one.first - one.sent)
        found["time_to_first_token"] = shown(one.first - call.began)
        found["inference_time"] = shown(one.last - one.first)
        found["time_per_token"] = shown((one.last - one.first) / max(1, one.tokens))
    return found


def parameters(params: SamplingParams) -> str:
    """What a request asks for beyond the defaults, as JSON; stop texts are counted, not told."""
    given = {
        field.name: len(value) if field.name in _LONG else value
        for field in fields(params)
        if (value := getattr(params, field.name)) != field.default
    }
    return json.dumps(given)


def shown(seconds: float) -> str:
    """A time in the unit that suits it, as TGI's spans have it: 1.5s, 20.25ms, 300µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.6g}{unit}"
    return f"{round(seconds * 1e9)}ns"
