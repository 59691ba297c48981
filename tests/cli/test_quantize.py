"""kvrun quantize on a command line: the folder, the table, the messages."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvrun.cli import quantize
from kvrun.runtime.calibrate import store

Run = Callable[..., Any]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The lamp stands on the table. What is 12 + 30? It is 42.\n" * 40)
    return path


def test_a_folder_and_what_it_cost(kvrun_command: Run, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "new"
    done = kvrun_command(
        "quantize", "tiny", "--method", "int8", "-o", str(out),
        "--calibration", str(text), "--check",
    )  # fmt: skip
    assert done.code == 0, done.err
    lines = [line.split() for line in done.out.splitlines()]
    assert lines[0] == ["original", "quantized"]
    assert [line[0] for line in lines[1:]] == ["perplexity", "KL,", "same", "size"]
    recipe = json.loads((out / "recipe.json").read_text())
    assert recipe["method"] == "int8"
    assert recipe["check"]["kl_mean"] < 0.05
    assert (out / "tokenizer.json").is_file()
    assert "\x1b" not in done.err
    again = kvrun_command("quantize", str(out), "--method", "int8", "-o", str(tmp_path / "b"))
    assert again.code == 4
    assert "quantized already" in again.err


def test_a_perplexity_that_means_nothing_is_said(kvrun_command: Run, tmp_path: Path) -> None:
    """The built-in model knows conversations, and little of the built-in text."""
    talk = tmp_path / "talk.txt"
    turn = "<|user|>What is 12 + 30?<|end|><|assistant|>12 + 30 = 42.<|end|>"
    talk.write_text(turn * 40)
    told = {}
    for name, words in {"foreign": [], "own": ["--calibration", str(talk)]}.items():
        out = tmp_path / name
        done = kvrun_command(
            "quantize", "tiny", "--method", "int8", "-o", str(out), "--check", *words
        )
        assert done.code == 0, done.err
        told[name] = "foreign to the model" in done.err
        found = json.loads((out / "recipe.json").read_text())["check"]
        assert (found["perplexity_before"] > 4096) == told[name]
    assert told == {"foreign": True, "own": False}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--method", "int3"], 2, "int3"),
        (["--method", "int4", "--group-size", "50"], 2, "--group-size is 50"),
        (["--method", "int4", "--group-size", "96"], 2, "do not divide"),
        (["--method", "gptq", "--calibration", "no-such-file"], 3, "no-such-file"),
        (["--method", "gptq", "--samples", "0"], 2, "--samples is 0"),
        (["--method", "fp8", "--group-size", "64"], 2, "no choice"),
        (["--method", "int8", "--format", "awq"], 2, "with --format awq: int4"),
        (["--method", "int4", "--format", "gguf"], 2, "one of: compressed-tensors, gptq, awq"),
    ],
)
def test_what_cannot_be_done(
    kvrun_command: Run, tmp_path: Path, words: list[str], code: int, said: str
) -> None:
    done = kvrun_command("quantize", "tiny", "-o", str(tmp_path / "new"), *words)
    assert done.code == code
    assert said in done.err
    assert not list(tmp_path.glob("new*"))


def test_an_output_that_is_there_stays(kvrun_command: Run, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    done = kvrun_command("quantize", "tiny", "--method", "int8", "-o", str(tmp_path / "new"))
    assert done.code == 2
    assert "is there already" in done.err
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["mine.txt"]


def test_weights_can_be_read_by_whom_the_rest_can(kvrun_command: Run, tmp_path: Path) -> None:
    done = kvrun_command("quantize", "tiny", "--method", "int8", "-o", str(tmp_path / "new"))
    assert done.code == 0
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "new").iterdir()}
    assert set(modes.values()) == {modes["recipe.json"]}


def test_text_that_nobody_looks_at_is_said(kvrun_command: Run, tmp_path: Path, text: Path) -> None:
    out = str(tmp_path / "new")
    done = kvrun_command(
        "quantize", "tiny", "--method", "int8", "-o", out, "--calibration", str(text)
    )
    assert done.code == 0
    assert "int8 looks at no text; --calibration" in done.err


def test_no_model_and_no_output(kvrun_command: Run, tmp_path: Path) -> None:
    assert kvrun_command("quantize", "tiny").code == 2
    done = kvrun_command("quantize", "no/such-model", "-o", str(tmp_path / "new"))
    assert done.code == 3


def test_the_formats_of_the_help_are_those_that_are_written() -> None:
    assert set(quantize.FORMATS) == set(store.FORMATS)


def test_a_format_of_choice(kvrun_command: Run, tmp_path: Path) -> None:
    out = tmp_path / "new"
    done = kvrun_command(
        "quantize", "tiny", "--method", "int4", "--group-size", "32", "--format", "gptq",
        "-o", str(out),
    )  # fmt: skip
    assert done.code == 0, done.err
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (said["quant_method"], said["group_size"]) == ("gptq", 32)
    assert json.loads((out / "recipe.json").read_text())["format"] == "gptq"
