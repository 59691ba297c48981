"""What starting the command costs in imports, and what its help promises."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvrun import __version__, errors
from kvrun.folder import names
from kvrun.runtime.sampling.params import SamplingParams

ROOT = Path(__file__).parents[1]
HEAVY = {
    "torch", "transformers", "textual", "fastapi", "numpy", "huggingface_hub", "tokenizers",
    "jinja2", "prompt_toolkit", "pydantic", "asyncio", "msgspec", "sqlite3", "markdown_it",
}  # fmt: skip


def kvrun(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("KVRUN_")}
    return subprocess.run(
        [sys.executable, "-m", "kvrun", *words],
        env=env | {"PYTHONPATH": str(ROOT)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "words",
    [["--help"], ["-h"], ["chat", "--help"], ["--version"], ["bench"], ["bench", "load", "-h"]],
)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kvrun", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(re.findall(r"\|\s+(\w+)$", done.stderr, re.MULTILINE))
    assert "typer" in loaded
    assert not loaded & HEAVY


def test_the_help_lists_commands_and_every_exit_code() -> None:
    done = kvrun("--help")
    assert done.returncode == 0
    for name in names("kvrun.cli"):
        assert re.search(rf"^  {name}  ", done.stdout, re.MULTILINE)
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and hasattr(k, "exit_code")]
    codes = {kind.exit_code for kind in kinds} | {0, 130}
    listed = " ".join(done.stdout.split())
    for code in codes:
        assert re.search(rf"(: |· ){code} \w", listed), code
    assert kvrun().stdout == done.stdout


def test_the_help_of_chat_has_groups_options_and_examples() -> None:
    done = kvrun("chat", "-h")
    assert done.returncode == 0
    for group in ("Arguments:", "Chat:", "Sampling", "Engine:", "Examples:"):
        assert re.search(rf"^{group}", done.stdout, re.MULTILINE), group
    for option in SamplingParams.options():
        assert re.search(rf"\b{option.name}\b", done.stdout), option.name
    for variable in re.findall(r"KVRUN_\w+", done.stdout):
        assert variable in {
            "KVRUN_MODEL", "KVRUN_DEVICE", "KVRUN_DTYPE", "KVRUN_MAX_MODEL_LEN", "KVRUN_KV_MEMORY",
            "KVRUN_NO_FALLBACK",
            "KVRUN_THREADS", "KVRUN_QUANTIZE",
        }  # fmt: skip
    examples = done.stdout.partition("Examples:\n")[2].strip().splitlines()
    assert 2 <= len(examples) <= 6
    assert all("kvrun chat" in line for line in examples)


def test_the_help_of_bench_lists_its_commands_each_with_examples() -> None:
    done = kvrun("bench", "--help")
    assert done.returncode == 0
    assert kvrun("bench").stdout == done.stdout
    for name in ("micro", "latency", "throughput", "load", "hw"):
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
        own = kvrun("bench", name, "-h")
        assert own.stdout.startswith(f"Usage: kvrun bench {name} ")
        assert f"kvrun bench {name}" in own.stdout.partition("Examples:\n")[2]


def test_the_version() -> None:
    assert kvrun("--version").stdout == f"kvrun {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("kvrun ch", ["chat"]),
        ("kvrun chat -m ti", ["tiny"]),
        ("kvrun chat t", ["tiny"]),
        ("kvrun chat -m org/", ["org/name"]),
        ("kvrun chat --dty", ["--dtype"]),
        ("kvrun chat --dtype bf", ["bfloat16"]),
        ("kvrun bench thr", ["throughput"]),
        ("kvrun bench micro ti", ["tiny"]),
        ("kvrun bench hw -o js", ["json", "jsonl"]),
    ],
)
def test_completion(tmp_path: Path, typed: str, offered: list[str]) -> None:
    (tmp_path / "models--org--name").mkdir()
    done = kvrun(
        _KVRUN_COMPLETE="complete_bash",
        COMP_WORDS=typed,
        COMP_CWORD=str(len(typed.split()) - 1),
        HF_HUB_CACHE=str(tmp_path),
    )
    assert done.stdout.split() == offered


def test_completion_can_be_shown_for_the_shell_it_runs_in() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m kvrun --show-completion; exit $?"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_KVRUN_COMPLETE=complete_bash" in done.stdout


def test_an_interrupt_while_the_command_is_imported_shows_no_traceback() -> None:
    program = """
import runpy, sys

class Impatient:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Impatient())
runpy.run_module("kvrun", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_command_is_what_python_m_runs() -> None:
    """Both begin in the file that knows what an early interrupt is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"kvrun": "kvrun.__main__:main"}


DEAF = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
except BaseException:
    pass
print("it goes on")
raise SystemExit(0)
"""


@pytest.mark.parametrize(
    "words",
    [
        ["fuse", "tiny", "pirate", "-o"], ["quantize", "tiny", "-o"],
        *(["bench", word, "-o"] for word in ("micro", "latency", "throughput", "lora", "hw")),
    ],
    ids=" ".join,
)  # fmt: skip
def test_no_import_of_torch_takes_ctrl_c_for_itself(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(DEAF)
    target = "json" if words[0] == "bench" else str(tmp_path / "new")
    done = kvrun(*words, target, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("before", "ends"), [("default_int_handler", "KeyboardInterrupt"), ("SIG_IGN", "ignored")]
)
def test_ctrl_c_is_as_it_was_behind_the_import(before: str, ends: str) -> None:
    script = f"""
import os, signal
signal.signal(signal.SIGINT, signal.{before})
from kvrun.cli._interrupt import at_once
with at_once():
    inside = signal.getsignal(signal.SIGINT)
assert (inside is signal.{before}) == ({ends!r} == "ignored")
os.kill(os.getpid(), signal.SIGINT)
print("ignored")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ends in done.stdout + done.stderr
