"""kvrun chat without a terminal: which word is the model, what is printed where, which code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from kvrun.cli._options import memory
from kvrun.errors import InvalidRequest

Run = Callable[..., "Result"]  # noqa: F821 (of conftest)
ROOT = Path(__file__).parents[2]


@pytest.fixture
def chat(kvrun_command: Run, model: Path) -> Run:
    return lambda *words, **kwargs: kvrun_command("chat", "-m", str(model), *words, **kwargs)


def prompts(scripted: ModuleType) -> str:
    engine = scripted.ScriptedEngine.started[-1]
    return engine.text.decode(engine.requests[-1].prompt_ids, skip_special=False)


def test_an_answer_is_the_only_thing_on_stdout(chat: Run) -> None:
    result = chat("say hello")
    assert (result.code, result.out, result.err) == (0, "hello\n", "")


def test_stats_go_to_stderr(chat: Run) -> None:
    result = chat("say hello", "--stats")
    assert result.out == "hello\n"
    assert "tokens/s, first token after" in result.err
    assert "KV 2 MB" in result.err


def test_a_pipe_gets_what_the_model_said_unchanged(chat: Run) -> None:
    assert chat("say **a** \x1b[31mb").out == "**a** \x1b[31mb\n"


def test_json(chat: Run) -> None:
    result = chat("say h\x9bé", "--json", "-o", "n=2", "-o", "logprobs=1")
    answer = json.loads(result.out)
    assert result.out.count("\n") == 1
    assert "\x9b" not in result.out  # escaped, as it would steer a terminal
    assert answer["text"] == "h\x9bé"
    assert answer["finish_reason"] == "stop"
    assert answer["completion_tokens"] == sum(c["completion_tokens"] for c in answer["choices"])
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["choices"][1]["logprobs"][0]["text"] == "h"
    assert {"model", "prompt_tokens", "cached_tokens", "first_token_seconds"} <= answer.keys()
    assert {"total_seconds", "tokens_per_second", "start_seconds"} <= answer.keys()


@pytest.mark.parametrize("option", ["n=2", "logprobs=1"])
def test_what_only_json_can_show_needs_it(chat: Run, option: str) -> None:
    result = chat("say x", "-o", option)
    assert result.code == 2
    assert "--json" in result.err


# -- which word is what ---------------------------------------------------------------------


def test_one_word_that_is_a_folder_is_the_model(kvrun_command: Run, model: Path) -> None:
    assert kvrun_command("chat", str(model), stdin=b"say piped").out == "piped\n"
    assert kvrun_command("chat", str(model), "say given").out == "given\n"


def test_any_other_word_is_the_prompt_of_the_default(
    kvrun_command: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVRUN_MODEL", str(model))
    result = kvrun_command("chat", "hello")
    assert (result.out, result.err) == ("You said: hello\n", "")
    result = kvrun_command("chat", "tinny")
    assert result.out == "You said: tinny\n"
    assert "'tiny'" in result.err
    result = kvrun_command("chat", "./not-there")
    assert result.out == "You said: ./not-there\n"
    assert "no folder is called so" in result.err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["chat", "no-org/no-model"], 3, "no-org/no-model"),
        (["chat", "-m", "tinny", "hi"], 3, "did you mean 'tiny'?"),
        (["chat", "nothing-here", "hi"], 3, "nothing-here"),
        (["chat", "-m", "a", "b", "c"], 2, "two arguments"),
        (["chat", "a", "b", "c"], 2, "kvrun chat --help"),
        (["caht"], 2, "chat"),
        (["chat", "--temprature", "1"], 2, "--temperature"),
        (["chat", "--top-k", "many"], 2, "--top-k"),
    ],
)
def test_words_that_cannot_be(kvrun_command: Run, words: list[str], code: int, said: str) -> None:
    result = kvrun_command(*words, stdin=b"question")
    assert result.code == code
    assert result.out == ""
    assert result.err.startswith("error: ")
    assert said in result.err
    assert "Traceback" not in result.err


# -- standard input -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "stdin", "prompt"),
    [
        ([], b"piped\n", "piped"),
        (["-"], b"dashed", "dashed"),
        (["and words"], b"piped\n", "piped\n\nand words"),
        (["only words"], b"", "only words"),
        ([], "\ufeffwith a mark é".encode(), "with a mark é"),
        ([], b"a\n\n  b\n", "a\n\n  b"),
    ],
)
def test_prompt_and_stdin(
    chat: Run, scripted: ModuleType, words: list[str], stdin: bytes, prompt: str
) -> None:
    assert chat(*words, stdin=stdin).code == 0
    assert prompts(scripted) == f"<|user|>{prompt}<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("stdin", "cause"),
    [
        (b"bad \xff byte", "byte 4 is 0xff"),
        ("text".encode("utf-16"), "iconv -f UTF-16"),
        (b"bin\0ary", "byte 3 is 0"),
        (b"", "the prompt is empty"),
        (b" \n\n", "the prompt is empty"),
    ],
)
def test_stdin_that_is_no_prompt(chat: Run, stdin: bytes, cause: str) -> None:
    result = chat(stdin=stdin)
    assert (result.code, result.out) == (2, "")
    assert cause in result.err
    assert "hint: " in result.err


def test_an_empty_prompt_is_refused(chat: Run) -> None:
    result = chat("")
    assert result.code == 2
    assert "prompt is empty" in result.err


# -- options --------------------------------------------------------------------------------


def test_options_reach_the_engine(chat: Run, scripted: ModuleType) -> None:
    sampling = ["-t", "0.5", "--top-p", "0.9", "--top-k", "7", "--min-p", "0.1", "--seed", "3"]
    more = ["--repetition-penalty", "1.1", "--max-tokens", "4", "--stop", "zz", "--stop", "yy"]
    named = ["-o", "presence_penalty=1", "-o", "logit-bias=5:-100", "-o", "top_k=9"]
    engine = ["--device", "cpu", "--dtype", "float32", "--max-model-len", "100"]
    sizes = ["--kv-memory", "64MiB", "--threads", "2"]
    result = chat("say abcdefgh", *sampling, *more, *named, *engine, *sizes)
    assert result.out == "abcd\n"
    last = scripted.ScriptedEngine.started[-1]
    params = last.requests[-1].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.seed, params.repetition_penalty, params.max_tokens) == (3, 1.1, 4)
    assert (params.stop, params.presence_penalty) == (("zz", "yy"), 1.0)
    assert params.logit_bias == {5: -100.0}
    config = last.config
    assert (config.device, config.dtype, config.max_model_len) == ("cpu", "float32", 100)
    assert (config.kv_memory, config.threads) == (64 * 2**20, 2)


def test_the_environment_stands_in_for_engine_options(
    chat: Run, scripted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVRUN_MAX_MODEL_LEN", "77")
    monkeypatch.setenv("KVRUN_KV_MEMORY", "0.25")
    chat("say x", "--max-model-len", "88")
    config = scripted.ScriptedEngine.started[-1].config
    assert (config.max_model_len, config.kv_memory) == (88, 0.25)


def test_the_models_own_defaults_count_unless_something_is_chosen(
    kvrun_command: Run, scripted: ModuleType, tmp_path: Path
) -> None:
    generation = {"do_sample": True, "temperature": 0.3, "top_k": 11}
    folder = scripted.make_model(tmp_path / "m", generation=generation)
    kvrun_command("chat", "-m", str(folder), "hi", "--top-k", "5")
    params = scripted.ScriptedEngine.started[-1].requests[-1].params
    assert (params.temperature, params.top_k) == (0.3, 5)


def test_the_system_prompt(chat: Run, scripted: ModuleType) -> None:
    chat("hi", "--system", "be brief")
    assert prompts(scripted).startswith("<|system|>be brief<|end|><|user|>hi")


def test_a_model_without_template_says_that_it_gets_the_text(
    kvrun_command: Run, scripted: ModuleType, tmp_path: Path
) -> None:
    folder = scripted.make_model(tmp_path / "m", template=False)
    result = kvrun_command("chat", "-m", str(folder), "Once upon")
    assert result.code == 0
    assert "it gets the text as it is" in result.err
    assert prompts(scripted) == "Once upon"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["-t", "-1"], 2, "temperature is -1"),
        (["--max-tokens", "0"], 2, "max_tokens is 0"),
        (["-o", "temprature=1"], 2, "did you mean 'temperature'?"),
        (["-o", "temperature"], 2, "NAME=VALUE"),
        (["--stop", ""], 2, "stop has a text of 0 characters"),
        (["--device", "tpu"], 2, "one of: auto, cpu, cuda"),
        (["--max-model-len", "0"], 2, "max_model_len is 0"),
        (["--kv-memory", "much"], 2, "--kv-memory is 'much'"),
        (["--max-model-len", "5"], 2, "5 fit"),
        (["--dtype", "float16"], 4, "float16 is not for this machine"),
    ],
)
def test_values_that_cannot_be(chat: Run, words: list[str], code: int, said: str) -> None:
    result = chat("say x", *words)
    assert (result.code, result.out) == (code, "")
    assert said in result.err
    assert result.err.startswith("error: ")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1024", 1024),
        ("512M", 512 * 10**6),
        ("2GiB", 2 * 2**30),
        ("1.5gb", 1_500_000_000),
        ("0.5", 0.5),
        ("50%", 0.5),
        ("1", 1.0),
    ],
)
def test_memory(text: str, value: float) -> None:
    assert memory(text) == value
    assert type(memory(text)) is type(value)


@pytest.mark.parametrize("text", ["", "-1", "0", "120%", "0%", "3Q", "ten", "1e9", "5i"])
def test_memory_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--kv-memory"):
        memory(text)


# -- when things break ----------------------------------------------------------------------


def test_a_dead_engine_is_70_and_what_came_is_kept(chat: Run) -> None:
    result = chat("die")
    assert (result.code, result.out) == (70, "Let me think \n")
    assert "error: the engine process has ended.\ncause: it was killed by signal 9" in result.err


def test_a_failed_request_is_1(chat: Run) -> None:
    result = chat("break")
    assert result.code == 1
    assert "NaN in the logits" in result.err


def test_a_folder_without_tokenizer(kvrun_command: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    result = kvrun_command("chat", "-m", str(tmp_path), "hi")
    assert result.code != 0
    assert "tokenizer" in result.err


def piped(model: Path, question: str, **kwargs: object) -> subprocess.Popen[bytes]:
    script = ROOT / "tests" / "chat" / "scripted.py"
    command = [sys.executable, str(script), "chat", "-m", str(model), question]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, **kwargs
    )  # type: ignore[call-overload]


def test_a_reader_that_goes_away_ends_it_quietly(model: Path) -> None:
    process = piped(model, "flood", stdout=subprocess.PIPE)
    assert process.stdout.read(1) == b"x"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 141
    process.stderr.close()


def test_a_full_disk_is_said_by_the_help_too() -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "kvrun", "--help"]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=env, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")


def test_a_full_disk_is_said(model: Path) -> None:
    with open("/dev/full", "wb") as full:
        process = piped(model, "say x", stdout=full)
        assert process.stderr.read() == b"error: No space left on device\n"
        assert process.wait() == 1
        process.stderr.close()
