"""Spans of requests: TGI's names and attributes, the caller's trace, and never a text."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from kvrun.errors import InvalidRequest
from kvrun.runtime.sampling.params import SamplingParams
from kvrun.server.tracing.otel import Tracing, parameters, shown, to_collector
from tests.server.conftest import Served, listening, served, until

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TGI = {
    "parameters", "total_time", "validation_time", "queue_time", "inference_time",
    "time_per_token",
}  # fmt: skip


@pytest_asyncio.fixture
async def traced(model: Path) -> AsyncIterator[tuple[Served, InMemorySpanExporter]]:
    exporter = InMemorySpanExporter()
    async with served(model, adapters={"sql": "/sql"}) as server:
        server.service.tracing = Tracing(SimpleSpanProcessor(exporter), "mine")
        yield server, exporter


Traced = tuple[Served, InMemorySpanExporter]


def tree(exporter: InMemorySpanExporter) -> tuple[ReadableSpan, dict[str, ReadableSpan]]:
    """The only span of a request, and those inside it."""
    spans = exporter.get_finished_spans()
    (outer,) = [span for span in spans if span.kind is SpanKind.SERVER]
    inner = {span.name: span for span in spans if span is not outer}
    assert outer.context
    for span in inner.values():
        assert span.parent
        assert span.parent.span_id == outer.context.span_id
    return outer, inner


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_request_in_tgis_words(traced: Traced) -> None:
    server, exporter = traced
    await server.generate(
        "say a secret", temperature=0.5, seed=7, stop=["hidden"], adapter_id="sql"
    )
    outer, inner = tree(exporter)
    found = attributes(outer)
    assert outer.name == "generate"
    assert outer.resource.attributes["service.name"] == "mine"
    assert set(found) >= TGI
    assert found["seed"] == 7
    assert found["adapter_id"] == "sql"
    assert found["generated_tokens"] == len("sql: a secret") + 1
    assert found["prompt_tokens"] == len("say a secret")
    assert json.loads(found["parameters"])["temperature"] == 0.5
    assert "secret" not in str(found)
    assert "hidden" not in str(found)
    assert set(inner) == {"validate", "queued", "infer"}
    moments = [inner["validate"].start_time]
    for name in ("validate", "queued", "infer"):
        assert abs((inner[name].start_time or 0) - (moments[-1] or 0)) <= 1  # of rounding, in ns
        moments.append(inner[name].end_time)
    assert outer.start_time == moments[0]
    assert (moments[-1] or 0) <= (outer.end_time or 0)


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("/generate_stream", {"inputs": "say hi"}, "generate_stream"),
        ("/", {"inputs": "say hi"}, "compat_generate"),
        ("/v1/completions", {"prompt": ["say hi", "say ho"]}, "completions"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]},
         "chat_completions"),
        ("/v1/embeddings", {"input": "x"}, "embeddings"),
    ],
)  # fmt: skip
async def test_every_route_has_its_name(traced: Traced, path: str, body: Any, name: str) -> None:
    server, exporter = traced
    await server.post(path, body)
    outer, _ = tree(exporter)
    assert outer.name == name
    assert outer.status.status_code is StatusCode.UNSET
    assert attributes(outer)["http.response.status_code"] == 200


async def test_the_callers_trace_goes_on(traced: Traced) -> None:
    server, exporter = traced
    body = {"prompt": "say hi"}
    for flags in ("00", "01"):
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-{flags}"}
        await server.post("/v1/completions", body, headers=headers)
    outer, _ = tree(exporter)  # the one that was not sampled is not there
    assert outer.context
    assert outer.parent
    assert f"{outer.context.trace_id:032x}" == TRACE
    assert f"{outer.parent.span_id:016x}" == PARENT
    exporter.clear()
    await server.post("/v1/completions", body, headers={"traceparent": "nonsense"})
    assert tree(exporter)[0].parent is None


async def test_failures_and_clients_that_leave(traced: Traced) -> None:
    server, exporter = traced
    await server.generate("say hi", temperature=0)
    outer, inner = tree(exporter)
    assert outer.status.status_code is StatusCode.ERROR
    assert outer.status.description == "validation"
    assert inner == {}
    assert "queue_time" not in attributes(outer)
    exporter.clear()
    await server.generate("break")
    outer, inner = tree(exporter)
    assert (outer.status.description, set(inner)) == ("generation", {"validate"})
    exporter.clear()
    await server.http.get("/metrics")
    await server.http.get("/generate")
    assert exporter.get_finished_spans() == ()


async def test_spans_reach_a_collector_before_the_server_has_ended(model: Path) -> None:
    got: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *words: object) -> None:
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    try:
        endpoint = f"http://127.0.0.1:{collector.server_port}"
        async with listening(model, otlp_endpoint=endpoint) as server:
            assert (await server.generate("say hi")).status_code == 200
        ((path, body),) = got
        assert path == "/v1/traces"
        assert b"text-generation-inference.router" in body
        assert b"queue_time" in body
    finally:
        await asyncio.to_thread(collector.shutdown)
        collector.server_close()


async def test_a_collector_that_is_away_costs_nobody_anything(model: Path) -> None:
    async with listening(model, otlp_endpoint="http://127.0.0.1:9") as server:
        assert (await server.generate("say hi")).status_code == 200
        assert server.ended
        await until(lambda: not server.service.active)


def test_without_the_packages_the_extra_is_named(model: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        f"sys.argv = ['kvrun', 'serve', {str(model)!r}, '-p', '0', '--otlp-endpoint', 'http://x']\n"
        "from kvrun.cli import main; main(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "kvrun[otel]" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_no_url_is_refused() -> None:
    for wrong in ("localhost:4318", "", "grpc://x:1", "http://"):
        with pytest.raises(InvalidRequest, match="--otlp-endpoint"):
            to_collector(wrong)


def test_times_and_parameters_as_text() -> None:
    assert [shown(t) for t in (1.5, 0.02025, 0.0003, 5e-8, 0.0)] == [
        "1.5s", "20.25ms", "300µs", "50ns", "0ns",
    ]  # fmt: skip
    told = json.loads(parameters(SamplingParams(top_k=3, stop=["a", "b"], logit_bias={1: 2.0})))
    assert told == {"top_k": 3, "stop": 2, "logit_bias": 1}
