"""Two processes over gloo say what one says: a family for each way of storing q, k and v."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.runtime.driver import Driver
from tests.runtime.gloo import logits
from tests.runtime.models import zoo

LAYOUTS = {
    "separate": ("llama", "v3"),
    "packed": ("phi3", "4k"),
    "grouped": ("falcon", "40b"),
    "per head": ("gpt_neox", "pythia"),
    "one key and value head": ("gpt_bigcode", "mqa"),
    "latent": ("deepseek_v3", "plain"),
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The models, each beside the logits of both ranks."""
    place = tmp_path_factory.mktemp("ranks")
    folders = {layout: place / layout.replace(" ", "-") for layout in LAYOUTS}
    for layout, (family, variant) in LAYOUTS.items():
        zoo.make(folders[layout], family, variant)
    command = [sys.executable, "-m", "tests.runtime.gloo"]
    rest = [str(place / "meeting"), *map(str, folders.values())]
    both = [
        subprocess.Popen([*command, str(rank), "2", *rest], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], ends
    return folders


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_are_one_model(ranks: dict[str, Path], layout: str) -> None:
    folder = ranks[layout]
    whole = logits(Driver(folder))
    parts = [torch.load(folder.with_suffix(f".{rank}"), weights_only=True) for rank in range(2)]
    assert torch.equal(*parts)
    torch.testing.assert_close(parts[0], whole, atol=1e-4, rtol=0.0)
