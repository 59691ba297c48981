"""kvrun chat on the real engine and the built-in model: the pieces fit together."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kvrun.hub.local import resolve
from kvrun.runtime.text import Text

ROOT = Path(__file__).parents[2]
QUESTION = "What is 12 + 30?"


def kvrun(*words: str, stdin: str = "", flags: tuple[str, ...] = ()) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, *flags, "-m", "kvrun", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "KVRUN_THREADS": "1"},
        input=stdin,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_one_question_one_answer_without_anything_heavy_in_this_process() -> None:
    code, out, err = kvrun("chat", QUESTION, "--json", "-t", "0", flags=("-X", "importtime"))
    assert code == 0, err
    answer = json.loads(out)
    assert answer["model"] == "tiny"
    assert answer["text"].strip()
    text = Text.open(resolve("tiny"))
    assert text
    assert answer["prompt_tokens"] == len(text.chat([{"role": "user", "content": QUESTION}]))
    loaded = set(re.findall(r"\|\s+(\w+)$", err, re.MULTILINE))
    assert "tokenizers" in loaded
    assert not loaded & {"torch", "transformers", "huggingface_hub", "numpy", "prompt_toolkit"}


def test_a_pipe_gets_the_same_text_as_json() -> None:
    _, out, err = kvrun("chat", stdin=QUESTION)
    code, answer, _ = kvrun("chat", "--json", "-", stdin=QUESTION)
    assert (code, err) == (0, "")
    assert out.removesuffix("\n") == json.loads(answer)["text"].removesuffix("\n")


def test_options_reach_the_real_engine() -> None:
    words = ("--max-tokens", "3", "--max-model-len", "64", "--kv-memory", "8M")
    code, out, err = kvrun("chat", QUESTION, "-o", "ignore_eos=true", "--json", "--stats", *words)
    assert code == 0, err
    assert json.loads(out)["completion_tokens"] == 3
    assert "context 64" in err


def test_sampling_with_a_seed_repeats() -> None:
    words = ("chat", "Tell me a story.", "-t", "2", "--seed", "7", "--max-tokens", "24")
    first, second = kvrun(*words), kvrun(*words)
    assert first[0] == 0
    assert first == second
    assert first[1] != kvrun(*words[:5], "8", *words[6:])[1]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--max-model-len", "4"], 2, "tokens; 4 fit"),
        (["--dtype", "float64"], 2, "dtype is 'float64'"),
        (["-o", "stop_token_ids=999999"], 2, "stop_token_ids"),
        (["--device", "cuda"], 4, "cuda"),
    ],
)
def test_what_the_engine_refuses_is_told_in_its_words(
    words: list[str], code: int, said: str
) -> None:
    result = kvrun("chat", QUESTION, *words)
    assert result[0] == code, result
    assert said in result[2]
    assert result[2].startswith("error: ")
    assert "Traceback" not in result[2]


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((resolve("tiny") / name).read_bytes())
    weights = (resolve("tiny") / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, out, err = kvrun("chat", "-m", str(tmp_path), QUESTION)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert "model.safetensors" in err
    assert "Traceback" not in err
