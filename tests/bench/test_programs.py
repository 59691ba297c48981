"""The programs of benchmarks/: without what they need they end at once and say why."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
Load = Callable[[str], ModuleType]
PIP = "pip install triton"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Load:
    """program(name): a benchmark as it is when it is started without arguments."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [str(FOLDER / f"{name}.py")])
        return import_module(name)

    return load


@pytest.mark.parametrize("name", ["engine", "quant", "lora"])
def test_without_a_gpu(
    program: Load, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = program(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        module.main()
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert err.startswith(f"{name}.py needs a CUDA GPU: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["quant", "lora"])
def test_without_triton(
    program: Load, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = program(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("needs.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{name}.py needs Triton: it is not installed; {PIP}\n"


def test_without_a_peer(
    program: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = program("engine")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--engine", "kvrun", "vllm"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("needs.find_spec", lambda name: None if name == "vllm" else name)
    with pytest.raises(SystemExit) as ended:
        module.main()
    assert ended.value.code == 2
    assert (
        capsys.readouterr().err == "engine.py needs vllm: it is not installed; pip install vllm\n"
    )
