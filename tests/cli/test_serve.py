"""kvrun serve as words on a command line: flags in TGI's names, environment, refusals."""

import socket
from collections.abc import Callable
from typing import Any

import pytest

import kvrun.server.run
from kvrun.runtime.config import EngineConfig
from kvrun.server.settings import Settings

Started = list[tuple[Settings, EngineConfig, int]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """What would have been served."""
    calls: Started = []

    def run(settings: Settings, config: EngineConfig, sock: Any, **_: Any) -> int:
        calls.append((settings, config, sock.getsockname()[1]))
        sock.close()
        return 0

    monkeypatch.setattr(kvrun.server.run, "run", run)
    return calls


def test_without_a_word_it_serves_tiny(kvrun_command: Callable[..., Any], started: Started) -> None:
    assert kvrun_command("serve", "-p", "0").code == 0
    settings, config, port = started[0]
    assert (settings.model, settings.hostname) == ("tiny", "127.0.0.1")
    assert config.model.endswith("tiny")
    assert port > 0
    assert (settings.max_best_of, settings.max_stop_sequences) == (2, 4)
    assert (settings.max_client_batch_size, settings.max_concurrent_requests) == (4, 1024)


def test_flags_of_tgi(kvrun_command: Callable[..., Any], started: Started) -> None:
    result = kvrun_command(
        "serve", "--model-id", "tiny", "--port", "0", "--max-total-tokens", "256",
        "--max-input-length", "200", "--max-batch-prefill-tokens", "300", "--max-batch-size", "7",
        "--max-concurrent-requests", "9", "--dtype", "bfloat16", "--json-output",
        "--graceful-termination-timeout", "5", "--waiting-served-ratio", "1.2",
        "--max-waiting-tokens", "3", "--prometheus-port", "9000", "--shard-uds-path", "/tmp/x",
        "--master-addr", "localhost", "--master-port", "1", "--api-key", "a", "--api-key", "b",
    )  # fmt: skip
    assert result.code == 0, result.err
    settings, config, _ = started[0]
    assert (settings.max_total_tokens, settings.max_input_tokens) == (256, 200)
    assert (config.max_model_len, config.max_num_batched_tokens) == (256, 300)
    assert (config.max_num_seqs, config.dtype) == (7, "bfloat16")
    assert settings.api_keys == ("a", "b")
    assert (settings.drain_timeout, settings.json_output) == (5.0, True)


def test_environment(
    kvrun_command: Callable[..., Any], started: Started, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "MODEL_ID": "tiny", "PORT": "0", "API_KEY": "secret", "MAX_TOTAL_TOKENS": "128",
        "KVRUN_MAX_BEST_OF": "5", "JSON_OUTPUT": "true", "HOSTNAME": "b3f1c2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert kvrun_command("serve").code == 0
    settings, config, _ = started[0]
    assert settings.api_keys == ("secret",)
    assert (config.max_model_len, settings.max_best_of) == (128, 5)
    assert settings.hostname == "127.0.0.1"  # every container has a HOSTNAME
    assert settings.json_output


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--hostname", "0.0.0.0"), 2, "without a key"),
        (("--host", "192.0.2.1"), 2, "--insecure-no-auth"),
        (("--trust-remote-code",), 4, "never run"),
        (("nobody-has-this",), 3, "no model"),
        (("--port", "99999"), 2, "--port is 99999"),
        (("--max-best-of", "0"), 2, "--max-best-of is 0"),
        (("--max-input-tokens", "9", "--max-total-tokens", "9"), 2, "must be below"),
        (("--hostname", "192.0.2.1", "--api-key", "k", "-p", "0"), 1, "--hostname is an address"),
        (("--port", "many"), 2, "(env var: 'KVRUN_PORT', 'PORT')"),
        (("a@b", "--revision", "c"), 2, "names a revision already"),
        (("tiny", "--model-id", "other"), 2, "two models: tiny and --model-id other"),
        (("--quantize", "gptq"), 2, "leave it out"),
    ],
)
def test_refusals(
    kvrun_command: Callable[..., Any],
    started: Started,
    words: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    result = kvrun_command("serve", *words)
    assert (result.code, started) == (code, []), result.err
    assert said in result.err


def test_a_port_that_is_taken(kvrun_command: Callable[..., Any], started: Started) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = kvrun_command("serve", "-p", str(taken.getsockname()[1]))
    assert (result.code, started) == (1, [])
    assert "--port 0 takes any that is free" in result.err


def test_a_public_address_on_ones_own_risk(
    kvrun_command: Callable[..., Any], started: Started
) -> None:
    result = kvrun_command("serve", "--hostname", "0.0.0.0", "-p", "0", "--insecure-no-auth")
    assert result.code == 0
    assert "without a key" in result.err
