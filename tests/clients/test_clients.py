"""Clients of the field, unmodified, in their own processes, against a server on the fake engine."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients.install import folder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ENGINE = ROOT / "tests" / "server" / "engine.py"
PATIENCE = 60.0


@contextmanager
def served(model: Path, *words: str) -> Iterator[str]:
    """The address of a server with the key "secret"."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, str(ENGINE), "serve", str(model), "-p", port, *words]
    names = ["--served-model-name", "toy", "--api-key", "secret", "--lora-adapters"]
    names.append(f"pirate={ROOT / 'kvrun' / 'tiny' / 'adapters' / 'pirate'}")
    server = subprocess.Popen([*command, *names], env=os.environ | {"PYTHONPATH": str(ROOT)})
    end = time.monotonic() + PATIENCE
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < end
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(PATIENCE)
    assert code == 0


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with served(model) as address:
        yield address


def run(target: Path | None, words: list[str]) -> str:
    """What a program says that sees only its own packages first; it must end well."""
    path = {"PYTHONPATH": str(target)} if target else {}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, *words],
        env=environment | path | {"HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        cwd="/",
        timeout=5 * PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["openai-2", "openai-3"])
def test_openai(url: str, name: str) -> None:
    run(folder(name), [str(HERE / "programs" / "openai_client.py"), url])


@pytest.mark.parametrize("name", ["hub-0", None], ids=["0", "current"])
def test_huggingface_hub(url: str, name: str | None) -> None:
    run(folder(name) if name else None, [str(HERE / "programs" / "hub_client.py"), url])


def test_text_generation(url: str) -> None:
    run(folder("text-generation"), [str(HERE / "programs" / "text_generation_client.py"), url])
