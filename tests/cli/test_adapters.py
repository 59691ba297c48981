"""kvrun chat --adapter and kvrun fuse, as words on a command line."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors import SafetensorError

from kvrun.hub.local import adapters_of
from kvrun.runtime.lora import fuse

Run = Callable[..., Any]
TINY = adapters_of("tiny")


def last(scripted: ModuleType) -> Any:
    return scripted.ScriptedEngine.started[-1]


def test_the_models_own_adapters_are_known(kvrun_command: Run, scripted: ModuleType) -> None:
    result = kvrun_command("chat", "-m", "tiny", "--adapter", "sql", "--json", "say hi")
    assert json.loads(result.out)["adapter"] == "sql"
    assert last(scripted).config.adapters == TINY
    assert last(scripted).requests[-1].adapter == "sql"
    result = kvrun_command("chat", "-m", "tiny", "--json", "say hi")
    assert "adapter" not in json.loads(result.out)
    assert last(scripted).requests[-1].adapter is None


def test_names_paths_and_the_first(kvrun_command: Run, scripted: ModuleType, model: Path) -> None:
    words = ["--adapter", f"arr={TINY['pirate']}", "--adapter", TINY["json"]]
    result = kvrun_command("chat", "-m", str(model), *words, "say hi")
    assert result.code == 0
    assert last(scripted).config.adapters == {"arr": TINY["pirate"], "json": TINY["json"]}
    assert last(scripted).requests[-1].adapter == "arr"


@pytest.mark.parametrize(
    ("word", "words"), [("nope", "json, pirate, sql"), ("x=/nowhere", "adapter_config.json")]
)
def test_an_adapter_that_is_not_there(kvrun_command: Run, word: str, words: str) -> None:
    result = kvrun_command("chat", "-m", "tiny", "--adapter", word, "say hi")
    assert result.code == 3
    assert words in result.err
    assert result.out == ""


def test_fuse(kvrun_command: Run, tmp_path: Path) -> None:
    out = tmp_path / "fused"
    assert kvrun_command("fuse", "tiny", "pirate", "-o", str(out)).code == 0
    assert (out / "tokenizer.json").is_file()
    modes = {path.name: path.stat().st_mode for path in out.iterdir()}
    assert set(modes.values()) == {modes["config.json"]}, "who may read one may read all"
    assert [p.name for p in tmp_path.iterdir() if "fused" in p.name] == ["fused"]
    again = kvrun_command("fuse", "tiny", "pirate", "-o", str(out))
    assert (again.code, "exists" in again.err) == (2, True)
    assert kvrun_command("fuse", "tiny", "nope", "-o", str(tmp_path / "x")).code == 3
    assert not (tmp_path / "x").exists()


def test_fuse_without_room(
    kvrun_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(fuse, "save_file", full)
    done = kvrun_command("fuse", "tiny", "pirate", "-o", str(tmp_path / "new"))
    assert done.code == 1
    assert "new cannot be written.\ncause: I/O error: No space left" in done.err
    assert not list(tmp_path.glob("*new*"))
