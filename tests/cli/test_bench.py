"""kvrun bench: what stands on stdout in every format, what on stderr, which code it ends with."""

import asyncio
import csv
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvrun.bench import hardware
from kvrun.bench.target import Target
from tests.bench.stub import Stub

Run = Callable[..., "Result"]  # noqa: F821 (of conftest)
SMALL = ("-p", "4", "-n", "24", "-b", "1,2", "-r", "2", "--device", "cpu")


@pytest.fixture(autouse=True)
def cache(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings by very small arrays are known already."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cached"))
    hardware.measured("cpu", quick=True, scale=0.002)


@pytest.fixture
def bench(kvrun_command: Run) -> Run:
    return lambda *words: kvrun_command("bench", *words)


@pytest.fixture
def server() -> Iterator[Stub]:
    """The scripted server in a thread of its own."""
    loop, ready, stub = asyncio.new_event_loop(), threading.Event(), Stub()
    stop = asyncio.Event()

    async def serve() -> None:
        async with stub:
            stub.answers("a", "b", usage=2)
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait()
    yield stub
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def test_micro(bench: Run) -> None:
    result = bench("micro", *SMALL)
    assert result.code == 0
    lines = result.out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["pp4", "1"], ["pp4", "2"], ["tg24", "1"], ["tg24", "2"],
    ]  # fmt: skip
    assert "% roofline" in lines[0]
    assert "tiny, real weights" in result.err
    assert "limits: " in result.err


def test_every_format_parses(bench: Run) -> None:
    words = ("micro", "-p", "4", "-n", "0", "-r", "1", "--device", "cpu", "-o")
    assert bench(*words, "md").out.splitlines()[1].startswith("|--")
    whole = json.loads(bench(*words, "json").out)
    assert whole["about"]["model_id"] == "tiny"
    assert whole["about"]["weights"] == "real"
    assert whole["about"]["ceilings"]["rates"]
    [row] = whole["results"]
    assert {"n_prompt", "n_gen", "n_depth", "avg_ts", "stddev_ts", "roofline_percent"} <= set(row)
    [line] = bench(*words, "jsonl").out.splitlines()
    assert json.loads(line)["test"] == "pp4"
    assert json.loads(line)["model_id"] == "tiny"
    [row] = csv.DictReader(io.StringIO(bench(*words, "csv").out))
    assert row["batch_size"] == "1"
    assert json.loads(row["shape"])["vocab_size"] == 4096


def test_without_the_roofline(bench: Run) -> None:
    result = bench("micro", *SMALL, "--no-roofline", "--chart")
    assert "roofline" not in result.out.splitlines()[0]
    assert "GB/s" in result.out.splitlines()[0]
    assert "limits" not in result.err
    assert "█" in result.out
    assert "│" not in result.out


def test_latency_and_a_picture(bench: Run, tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    result = bench(
        "latency", "--input-len", "4", "--output-len", "2", "-b", "2", "-r", "2", "--warm-ups", "0",
        "--device", "cpu", "-o", "json", "--plot", str(path), "--seed", "3", "-e", "seed=9",
    )  # fmt: skip
    whole = json.loads(result.out)
    [row] = whole["results"]
    assert (row["test"], row["batch_size"], row["seed"], len(row["latencies"])) == ("4/2", 2, 3, 2)
    assert whole["about"]["engine"]["seed"] == 9
    assert whole["about"]["engine"]["max_model_len"] == 6
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_throughput_of_workloads_and_files(bench: Run, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"prompt": "Once upon a time", "output_tokens": 3}\n{"prompt": [5, 6]}\n')
    result = bench(
        "throughput", "-w", "4/2", "-n", "2", "-w", str(path), "--output-len", "2", "-r", "1",
        "--device", "cpu", "-o", "json",
    )  # fmt: skip
    first, second = json.loads(result.out)["results"]
    assert (first["total_input_tokens"], first["total_output_tokens"]) == (8, 4)
    assert (second["test"], second["total_output_tokens"]) == ("some.jsonl", 5)


def test_hw(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hardware.measured
    monkeypatch.setattr(hardware, "measured", lambda *a, **kw: whole(*a, **kw, scale=0.002))
    result = bench("hw", "--device", "cpu", "--threads", "1", "-o", "json")
    found = json.loads(result.out)
    assert found["about"]["threads"] == 1
    assert {row["unit"] for row in found["results"]} == {"GB/s", "TFLOP/s"}
    assert "triad" in bench("hw", "--device", "cpu").out


def test_a_folder_without_weights_says_so(bench: Run, tmp_path: Path) -> None:
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "vocab_size": 100,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = bench("micro", str(tmp_path), "-p", "4", "-n", "0", "-r", "1", "--device", "cpu")
    assert result.code == 0
    assert "weights are random" in result.err


def test_ctrl_c_prints_what_has_been_measured(bench: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = Target.seconds, []

    def seconds(*args: object) -> float:
        calls.append(1)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Target, "seconds", seconds)
    result = bench("micro", "-p", "4", "-n", "8", "-r", "2", "--device", "cpu")
    assert result.code == 130
    assert [line.split()[0] for line in result.out.splitlines()[1:]] == ["pp4"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["micro", "-p", "9-1"], 2, "runs backwards"),
        (["micro", "-p", "0", "-n", "0"], 2, "nothing to measure"),
        (["micro", "-o", "xml"], 2, "-o is 'xml'"),
        (["micro", "--shape", "qwen3-06b"], 3, "did you mean 'qwen3-0.6b'"),
        (["micro", "tiny", "--shape", "qwen3-0.6b"], 2, "MODEL and a --shape"),
        (["micro", "no-such-model"], 3, "no model"),
        (["micro", "-b", "4", "-e", "max_num_seqs=2"], 2, "do not run at once"),
        (["micro", "-e", "speed=9"], 2, "no option of the engine"),
        (["micro", "--plot", "/no/such/folder/x.svg"], 2, "cannot be written"),
        (["micro", "--plot", "x.png"], 2, "writes SVG"),
        (["micro", "--threads", "0"], 2, "--threads is 0"),
        (["micro", "-d", "5000"], 4, "the model was made for 2,048"),
        (["micro", "-d", "1000", "--kv-memory", "1M"], 4, "max_model_len="),
        (["latency", "-b", "0"], 2, "--batch-size is 0"),
        (["latency", "--warm-ups", "-1"], 2, "--warm-ups is -1"),
        (["micro", "-r", "0"], 2, "--repetitions is 0"),
        (["throughput", "-n", "0"], 2, "--requests is 0"),
        (["load", "http://h", "-c", "0"], 2, "--concurrency is 0"),
        (["throughput", "-w", "fast"], 2, "no workload 'fast'"),
        (["throughput", "-w", "none.jsonl"], 3, "no file none.jsonl"),
        (["hw", "--device", "cuda"], 4, "no CUDA device"),
        (["load", "http://127.0.0.1:1"], 5, "no answer from http://127.0.0.1:1"),
        (["load", "ftp://h"], 2, "no URL"),
        (["load", "http://h", "-c", "1", "--rate", "1"], 2, "choose one"),
        (["load", "http://h", "--rate", "0"], 2, "--rate is 0"),
        (["load", "http://h", "--slo", "x=1"], 2, "no bound"),
        (["load"], 2, "URL"),
        (["fly"], 2, "fly"),
    ],
)
def test_bad_input(bench: Run, words: list[str], code: int, said: str) -> None:
    result = bench(*words)
    assert (result.code, result.out) == (code, "")
    assert said in result.err
    assert "Traceback" not in result.err


def test_load(bench: Run, server: Stub) -> None:
    result = bench("load", server.url, "-c", "2", "-n", "4", "-w", "3/2", "--slo", "ttft=60s")
    assert result.code == 0
    assert "4 of 4 requests succeeded, 0 failed" in result.out
    assert "28 in, 8 out" in result.out
    assert "goodput" in result.out
    assert "time to first token" in result.out
    # One request before, which does not count.
    assert len(server.bodies) == 5
    assert [body["max_tokens"] for body in server.bodies] == [2] * 5
    assert {body["model"] for body in server.bodies} == {"stub"}


def test_load_as_json_by_rate_in_a_chat(bench: Run, server: Stub) -> None:
    server.answers("a", "b", usage=2, chat=True)
    result = bench(
        "load", server.url, "--api", "chat", "--rate", "inf", "-n", "3", "-w", "3/2", "-m", "other",
        "--api-key", "K", "--no-ignore-eos", "-o", "jsonl",
    )  # fmt: skip
    found = json.loads(result.out)
    assert (found["completed"], found["failed"], found["model_id"]) == (3, 0, "other")
    assert found["endpoint"] == "/v1/chat/completions"
    assert {"mean_ttft_ms", "p99_itl_ms", "median_e2el_ms", "request_throughput"} <= set(found)
    assert all(r[2]["authorization"] == "Bearer K" for r in server.requests)
    assert not [r for r in server.requests if r[0] == "GET" or "ignore_eos" in r[3]]
    assert len(server.bodies[0]["messages"][0]["content"].split()) == 3


def test_load_with_failures(bench: Run, server: Stub) -> None:
    server.script = [*server.script[:1], "drop"]
    result = bench("load", server.url, "-n", "3", "-w", "3/2")
    assert result.code == 1
    assert result.out == ""
    assert "has not answered the first request" in result.err
    server.status, server.reply = 404, b'{"error": "no such route"}'
    result = bench("load", server.url + "/v2", "-m", "stub")
    assert result.code == 3
    assert "no such route" in result.err


def test_load_whose_requests_all_fail_has_figures_and_an_exit_code(
    bench: Run, server: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = server._answer

    async def first_only(*args: asyncio.StreamReader | asyncio.StreamWriter) -> bool:
        if len(server.bodies) == 1:
            server.status = 503
        return await whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(server, "_answer", first_only)
    result = bench("load", server.url, "-n", "3", "-w", "3/2", "-o", "json")
    [row] = json.loads(result.out)["results"]
    assert (row["completed"], row["failed"]) == (0, 3)
    assert row["mean_ttft_ms"] is None
    assert result.code == 1
    assert "no request has succeeded" in result.err


def test_ctrl_c_under_load_prints_what_has_come(
    bench: Run, server: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = server._answer

    async def interrupting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if len(server.bodies) == 4:
            # The client asks again: it has all of the last answer.
            await reader.readline()
            os.kill(os.getpid(), signal.SIGINT)
            return False
        return await whole(reader, writer)

    monkeypatch.setattr(server, "_answer", interrupting)
    result = bench("load", server.url, "-c", "1", "-n", "50", "-w", "3/2", "-o", "json")
    assert result.code == 130
    [row] = json.loads(result.out)["results"]
    assert row["completed"] == 3


def test_lora(bench: Run) -> None:
    small = ("-p", "4", "-n", "16", "-b", "2", "-r", "1", "--rank", "2", "--device", "cpu")
    result = bench("lora", *small, "--popularity", "identical,distinct", "-o", "json")
    assert result.code == 0, result.err
    rows = json.loads(result.out)["results"]
    assert [row["popularity"] for row in rows] == ["base", "identical", "distinct"]
    assert [row["adapters"] for row in rows] == [0, 1, 2]
    assert rows[2]["adapter_bytes"] == 2 * rows[1]["adapter_bytes"] > 0
    wrong = bench("lora", *small, "--popularity", "loved")
    assert (wrong.code, wrong.out) == (2, "")
    assert bench("lora", *small[:-2], "--rank", "0").code == 2


@pytest.mark.parametrize("targets", ["foo", "q_proj,foo", "q_proj,"])
def test_lora_on_products_that_are_not_there(bench: Run, targets: str) -> None:
    done = bench("lora", "-p", "4", "-n", "4", "-b", "1", "-r", "1", "--targets", targets)
    assert (done.code, done.out) == (2, "")
    assert "--targets: this model has no product called" in done.err
