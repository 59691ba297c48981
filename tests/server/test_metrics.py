"""/metrics: the names that dashboards ask for, and numbers that are true."""

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Served, served

# What TGI's own dashboard asks for, where an engine without phases can answer.
BOARD = (
    "tgi_request_count", "tgi_request_success", "tgi_request_duration_bucket",
    "tgi_request_queue_duration_bucket", "tgi_request_mean_time_per_token_duration_bucket",
    "tgi_request_input_length_bucket", "tgi_request_skipped_tokens_bucket",
    "tgi_request_generated_tokens_bucket", "tgi_request_generated_tokens_sum",
    "tgi_request_generated_tokens_count", "tgi_request_max_new_tokens_bucket",
    "tgi_request_validation_duration_bucket", "tgi_request_inference_duration_bucket",
    "tgi_batch_current_size", "tgi_batch_current_max_tokens", "tgi_queue_size",
    "tgi_batch_inference_count", "tgi_batch_inference_success", "tgi_batch_inference_failure",
    "tgi_batch_inference_duration_bucket", "tgi_batch_next_size_bucket",
    "tgi_batch_max_total_tokens",
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
    "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket",
    "vllm:generation_tokens_total", "vllm:prefix_cache_hits_total", "vllm:lora_requests_info",
    "kvrun_kv_blocks_used", "kvrun_kv_page_leak", "kvrun_log_errors_total",
)  # fmt: skip


async def scrape(server: Served) -> dict[str, float]:
    """Samples by name and labels, as Prometheus writes them."""
    answer = await server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    list(text_string_to_metric_families(answer.text))  # it can be parsed
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


async def test_every_name_of_the_board_is_there(server: Served) -> None:
    await server.chat("say hi")
    names = {sample.partition("{")[0] for sample in await scrape(server)}
    assert not set(BOARD) - names
    assert not [name for name in names if name.endswith("_created")]


async def test_what_is_counted(server: Served) -> None:
    await server.chat("say hi")
    await server.chat("say hi", stream=True)
    await server.generate("say hi", top_k=0)
    await server.chat("break")
    await server.post("/generate_stream", {"inputs": "die"})
    await server.http.get("/v1/models")
    found = await scrape(server)
    assert found["tgi_request_count"] == 5
    assert found["tgi_request_success"] == 2
    assert found['tgi_request_failure{err="validation"}'] == 1
    assert found['tgi_request_failure{err="generation"}'] == 1
    assert found['tgi_request_failure{err="unavailable"}'] == 1
    assert found["tgi_request_duration_count"] == 2
    assert found["tgi_request_generated_tokens_sum"] == 3 + 3 + 12
    assert found['vllm:request_success_total{model_name="toy",finished_reason="stop"}'] == 2
    assert found["vllm:time_to_first_token_seconds_count"] == 3
    assert found["vllm:inter_token_latency_seconds_count"] == 2 + 2 + 11
    assert found['kvrun_adapter_requests_total{adapter=""}'] == 4


async def test_steps_by_what_they_computed(server: Served) -> None:
    found = await scrape(server)
    for method, count, tried in (("prefill", 2, 2), ("decode", 5, 8)):
        labels = f'{{method="{method}"}}'
        assert found[f"tgi_batch_inference_success{labels}"] == count
        assert found[f"tgi_batch_inference_count{labels}"] == tried
        assert found[f"tgi_batch_inference_duration_count{labels}"] == count
    name = "tgi_batch_inference_duration_bucket"
    buckets = [value for key, value in found.items() if key.startswith(f'{name}{{method="dec')]
    assert len(buckets) == 36
    assert buckets == [0, *[4] * 34, 5]
    assert found['tgi_batch_inference_duration_sum{method="decode"}'] == 200.0008
    assert [found[f'tgi_batch_next_size_bucket{{le="{size}"}}'] for size in (1.0, 2.0, 3.0)] == [
        2, 2, 6
    ]  # fmt: skip
    assert found['tgi_batch_next_size_bucket{le="1024.0"}'] == 6
    assert found['tgi_batch_next_size_bucket{le="+Inf"}'] == 7 == found["tgi_batch_next_size_count"]
    assert found["tgi_batch_next_size_sum"] == 2 + 12 + 2000


async def test_buckets_follow_the_model(server: Served) -> None:
    found = await scrape(server)
    lengths = [name for name in found if name.startswith("tgi_request_input_length_bucket")]
    assert len(lengths) == 101
    assert 'tgi_request_input_length_bucket{le="511.0"}' in found
    assert 'tgi_request_generated_tokens_bucket{le="512.0"}' in found


async def test_a_page_that_belongs_to_nobody_shows(server: Served) -> None:
    assert (await scrape(server))["kvrun_kv_page_leak"] == 0
    stats = await server.engine.stats()
    stats.blocks_active = 3  # nobody runs, and still something is held

    async def leaking() -> object:
        return stats

    server.engine.stats = leaking  # type: ignore[assignment,method-assign]
    assert (await scrape(server))["kvrun_kv_page_leak"] == 3


async def test_there_are_metrics_before_the_model(model: Path) -> None:
    async with served(model, start=False) as server:
        assert (await scrape(server))["tgi_request_count"] == 0
