"""A Hub on this machine, an empty cache, and no waiting between tries."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.utils._http
import pytest

from kvrun.hub import transfer
from tests.hub import server

ROOT = Path(__file__).parents[2]
WEIGHTS = bytes(range(256)) * 800
MODEL = {
    "config.json": json.dumps({"model_type": "llama", "max_position_embeddings": 64}).encode(),
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b'{"version": "1.0"}',
    "README.md": b"# a model",
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "XDG_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[server.Hub]:
    """A Hub with org/m. Pauses between tries take no time, and bytes are kept as they come."""
    clock = SimpleNamespace(sleep=lambda seconds: None, time=time.time)
    monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
    monkeypatch.setattr(huggingface_hub.utils._http, "time", clock)
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    with server.running() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        running.add("org/m", MODEL)
        yield running


@pytest.fixture
def kvrun(hub: server.Hub) -> Callable[..., "subprocess.Popen[str]"]:
    """Start `kvrun WORDS` in a process of its own, where the shell has set a `limit`."""

    def start(*words: str, limit: str = "true") -> "subprocess.Popen[str]":
        return subprocess.Popen(
            ["bash", "-c", f'{limit}; exec "$@"', "-", sys.executable, "-m", "kvrun", *words],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return start
