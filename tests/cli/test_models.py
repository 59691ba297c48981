"""kvrun pull, ls, show, rm, env: what they print, where, and with which exit code."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import kvrun.runtime.engine.client
from kvrun import folder
from kvrun.cli import _machine, _transfer, env
from kvrun.errors import EXTRAS
from kvrun.hub.known import MODELS
from kvrun.hub.transfer import File
from kvrun.runtime.text import Text
from tests.cli.conftest import SCRIPTED, Result, Terminal
from tests.hub.conftest import MODEL, cache, hub
from tests.hub.server import Fault, Hub
from tests.runtime.attention import fake_flashinfer

__all__ = ["cache", "hub"]  # fixtures
Run = Callable[..., Result]


@pytest.fixture
def in_terminal(hub: Hub) -> Iterator[Callable[..., Terminal]]:
    """Start `kvrun WORDS` on the scripted engine in a terminal."""
    opened = []

    def start(*words: str) -> Terminal:
        opened.append(Terminal([str(SCRIPTED), *words], (24, 160)))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_pull_prints_the_folder_and_says_the_rest(hub: Hub, kvrun_command: Run) -> None:
    done = kvrun_command("pull", "org/m")
    assert done.code == 0
    folder = Path(done.out.strip())
    assert (folder / "config.json").is_file()
    said = done.err.splitlines()
    assert re.fullmatch(r"pulling org/m: 4 files, 205 kB", said[0])
    assert sorted(line.split("  ")[0] for line in said[1:-1]) == sorted(MODEL)
    assert re.fullmatch(r"org/m is complete: 205 kB in .* s, .*/s", said[-1])
    again = kvrun_command("pull", "org/m")
    assert (again.code, again.out) == (0, done.out)
    assert again.err == "org/m is complete and up to date\n"
    assert kvrun_command("pull", "org/m", "-q") == Result(0, done.out, "")


def test_a_pull_as_json(hub: Hub, kvrun_command: Run) -> None:
    plan = kvrun_command("pull", "org/m", "--dry-run", "--json")
    told = json.loads(plan.out)
    assert told["to_fetch"] == told["bytes"] == sum(map(len, MODEL.values()))
    assert {file["name"]: file["here"] for file in told["files"]} == dict.fromkeys(MODEL, False)
    done = kvrun_command("pull", "org/m", "--json")
    assert done.err == ""
    assert Path(json.loads(done.out)["path"]).is_dir()
    told = json.loads(kvrun_command("pull", "org/m", "--dry-run", "--json").out)
    assert told["to_fetch"] == 0
    assert all(file["here"] for file in told["files"])


def test_a_dry_run_is_a_table(hub: Hub, kvrun_command: Run) -> None:
    done = kvrun_command("pull", "org/m", "--dry-run")
    assert done.code == 0
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == sorted(MODEL)
    assert re.search(r"model.safetensors +205 kB", done.out)
    assert lines[-1] == "4 files, 205 kB; 205 kB to fetch"
    assert not hub.sent


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["org/none"], 3, "is not on"),
        (["org/m@v9"], 3, "no revision 'v9'"),
        (["gated/m"], 3, "accept its terms at"),
        (["org/gguf"], 4, "GGUF"),
        (["tiny"], 2, "part of kvrun"),
        (["qwen3-0.6b"], 2, "did you mean 'Qwen/Qwen3-0.6B'?"),
        (["./none"], 3, "no folder"),
        (["org/m", "--exclude", "*"], 3, "no file is left"),
        ([], 2, "needs the name"),
    ],
)
def test_refusals(hub: Hub, kvrun_command: Run, words: list[str], code: int, said: str) -> None:
    hub.add("gated/m", MODEL, gated=True)
    hub.add("org/gguf", {"config.json": b"{}", "m.gguf": b"x"})
    done = kvrun_command("pull", *words)
    assert done.code == code
    assert said in done.err
    assert done.out == ""


def test_offline_what_is_here_is_enough(
    hub: Hub, kvrun_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = kvrun_command("pull", "org/m")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = kvrun_command("pull", "org/m")
    assert (done.code, done.out) == (0, first.out)
    assert "here and complete" in done.err
    assert kvrun_command("pull", "org/other").code == 5
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert kvrun_command("pull", "org/m").out == first.out


def test_the_list_names_what_kvrun_runs(kvrun_command: Run) -> None:
    done = kvrun_command("pull", "--list")
    known = folder.names("kvrun.runtime.models")
    listed = [line.split()[0] for line in done.out.splitlines() if "/" in line.split(" ")[0]]
    assert listed == [model.name for model in MODELS if model.model_type in known]
    assert kvrun_command("pull", "--list", "-q").out.split() == listed
    told = json.loads(kvrun_command("pull", "--list", "--json").out)["models"]
    assert [row["name"] for row in told] == listed
    sizes = [model.bytes for model in MODELS]
    assert sizes == sorted(sizes)


def test_a_local_folder_is_completed(kvrun_command: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for name, data in MODEL.items():
        (tmp_path / "model" / name).write_bytes(data)
    done = kvrun_command("pull", str(tmp_path / "model"))
    assert done == Result(0, f"{tmp_path / 'model'}\n", "nothing is missing\n")


def test_a_dry_run_of_a_local_folder_writes_nothing(kvrun_command: Run, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer_config.json", "pytorch_model.bin"):
        (folder / name).write_bytes(b"{}")
    done = kvrun_command("pull", str(folder), "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert done.out == "would make safetensors of the .bin files and tokenizer.json\n"
    told = json.loads(kvrun_command("pull", str(folder), "--dry-run", "--json").out)
    assert told["lacks"] == ["safetensors of the .bin files", "tokenizer.json"]
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["FOLDER", "--include", "*.md"], "choose files of the Hub"),
        (["FOLDER", "--exclude", "*.md"], "choose files of the Hub"),
        (["--list", "org/m"], "--list takes no MODEL"),
    ],
)
def test_options_of_pull_that_would_have_no_effect_are_refused(
    words: list[str], said: str, kvrun_command: Run, tmp_path: Path
) -> None:
    done = kvrun_command("pull", *(str(tmp_path) if w == "FOLDER" else w for w in words))
    assert done.code == 2
    assert said in done.err


def test_ls(hub: Hub, kvrun_command: Run) -> None:
    base = b'{"base_model_name_or_path": "org/m"}'
    hub.add("org/a", {"adapter_config.json": base, "adapter_model.safetensors": b"x"})
    hub.add("org/cut", MODEL | {"model.safetensors": b"other"})
    hub.faults.append(Fault("model.safetensors", status=404))
    assert kvrun_command("pull", "org/cut").code == 5
    for name in ("org/m", "org/a"):
        assert kvrun_command("pull", name).code == 0
    done = kvrun_command("ls")
    rows = {line.split()[0]: line for line in done.out.splitlines()}
    assert list(rows) == ["NAME", "org/a", "org/cut", "org/m", "tiny"]
    assert "adapter for org/m" in rows["org/a"]
    assert "not complete: lacks config.json" in rows["org/cut"]
    assert re.search(r"205 kB +\d{4}-\d\d-\d\d +llama +64$", rows["org/m"])
    assert rows["tiny"].endswith("built in")
    assert kvrun_command("ls", "-q").out.split() == ["org/a", "org/cut", "org/m", "tiny"]
    told = {row["name"]: row for row in json.loads(kvrun_command("ls", "--json").out)["models"]}
    assert told["org/m"]["complete"] is True
    assert told["org/cut"]["lacks"] == "config.json"
    assert told["org/a"]["base"] == "org/m"


def test_ls_is_not_stopped_by_a_damaged_model(hub: Hub, kvrun_command: Run, cache: Path) -> None:
    snapshot = Path(kvrun_command("pull", "org/m").out.strip())
    (snapshot / "config.json").resolve().write_text('["not", "an object"]')
    done = kvrun_command("ls")
    assert done.code == 0
    assert "org/m" in done.out


def test_show_the_built_in_model(kvrun_command: Run) -> None:
    done = kvrun_command("show")
    assert done.code == 0
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in done.out.splitlines())
    assert rows["architecture"] == "llama"
    assert rows["parameters"] == "8,131,328"
    assert rows["chat template"] == "yes"
    assert rows["adapters"].startswith("json, pirate, sql")
    assert rows["runs here"].startswith("yes: weights ")
    told = json.loads(kvrun_command("show", "tiny", "--json").out)
    assert told["supported"] is True
    assert told["fits"] is True


def test_show_what_cannot_run_here(
    kvrun_command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(kvrun.__path__[0]) / "tiny"
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(source / name)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "unheard_of"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tight = _machine.Device("a small GPU", False, 1_000_000, 2_000_000)
    monkeypatch.setattr(_machine, "device", lambda: tight)
    done = kvrun_command("show", str(tmp_path))
    assert "unheard_of (kvrun does not know it)" in done.out
    assert "runs here      no: the weights need 16.3 MB, 1.0 MB are free." in done.out
    assert "chat template  no" in done.out
    assert kvrun_command("show", "org/none").code == 3


def test_show_what_a_model_sees(kvrun_command: Run, tmp_path: Path) -> None:
    source = Path(kvrun.__path__[0]) / "tiny"
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).symlink_to(source / name)
    text = json.loads((source / "config.json").read_text())
    tower = {"model_type": "clip_vision_model", "image_size": 42, "patch_size": 14}

    def shown(**values: Any) -> tuple[dict[str, str], Any]:
        whole = {"text_config": text, "image_token_index": 3, **values}
        (tmp_path / "config.json").write_text(json.dumps(whole))
        done = kvrun_command("show", str(tmp_path))
        rows = dict(re.split(r"  +", line, maxsplit=1) for line in done.out.splitlines())
        return rows, json.loads(kvrun_command("show", str(tmp_path), "--json").out)["images"]

    rows, told = shown(model_type="llava", vision_config=tower)
    assert rows["architecture"] == "llama"
    word = Text(source).decode([3], skip_special=False)
    seen = f"clip_vision_model, 42 × 42; {word} (token 3) stands for one"
    assert rows["images"] == f"yes (llava): {seen}"
    assert (told["tower"], told["token"], told["token_id"]) == ("clip_vision_model", word, 3)
    odd = tower | {"model_type": "odd_tower"}
    rows, told = shown(model_type="llava", vision_config=odd)
    assert rows["images"] == "not taken: only its text part runs here"
    assert told == {"taken": False, "tower": "odd_tower"}
    (tmp_path / "tokenizer.json").unlink()
    rows, told = shown(model_type="mistral3", vision_config={"model_type": "pixtral"})
    assert rows["images"] == "yes (mistral3): pixtral, at most 1540 × 1540; token 3 stands for one"
    rows, told = shown(model_type="llama")
    assert "images" not in rows
    assert told is None


def test_show_an_adapter(hub: Hub, kvrun_command: Run) -> None:
    config = {"base_model_name_or_path": "org/m", "r": 8, "target_modules": ["v", "q"]}
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": b"x"}
    hub.add("org/a", files)
    done = kvrun_command("pull", "org/a")
    assert done.err.endswith("an adapter for org/m\n")
    for name in ("org/a", done.out.strip()):
        told = json.loads(kvrun_command("show", name, "--json").out)
        assert (told["model"], told["rank"], told["modules"]) == ("org/m", 8, "q, v")
    refused = kvrun_command("chat", "-m", "org/a", "hi")
    assert refused.code == 4
    assert "is an adapter, not a model" in refused.err


def test_a_pull_warns_of_what_kvrun_cannot_run(hub: Hub, kvrun_command: Run) -> None:
    config = {"model_type": "unheard_of", "quantization_config": {"quant_method": "odd"}}
    hub.add("org/new", MODEL | {"config.json": json.dumps(config).encode()})
    done = kvrun_command("pull", "org/new")
    assert done.code == 0
    assert done.err.startswith(
        "note: kvrun does not know the architecture 'unheard_of'\n"
        "note: kvrun does not read weights stored as 'odd'\n"
    )
    assert "note" not in kvrun_command("pull", "org/m").err


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        {"model_type": "RefinedWeb"},
    ],
)
def test_a_pull_knows_text_parts_and_former_names(
    hub: Hub, kvrun_command: Run, config: dict[str, object]
) -> None:
    hub.add("org/new", MODEL | {"config.json": json.dumps(config).encode()})
    done = kvrun_command("pull", "org/new")
    assert done.code == 0
    assert "note" not in done.err


def test_rm(hub: Hub, kvrun_command: Run) -> None:
    kvrun_command("pull", "org/m")
    refused = kvrun_command("rm", "org/m")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert kvrun_command("rm", "--yes", "org/m", "org/none").code == 3  # and nothing is removed
    assert "org/m" in kvrun_command("ls", "-q").out
    done = kvrun_command("rm", "--yes", "org/m")
    assert done.code == 0
    assert done.err == "removed org/m: 205 kB\n"
    assert kvrun_command("ls", "-q").out.split() == ["tiny"]


def test_rm_asks(hub: Hub, kvrun_command: Run, in_terminal: Callable[..., Terminal]) -> None:
    kvrun_command("pull", "org/m")
    for answer, code, left in (("n", 1, ["org/m", "tiny"]), ("y", 0, ["tiny"])):
        terminal = in_terminal("rm", "org/m")
        terminal.expect("remove org/m? [y/N]")
        terminal.type(f"{answer}\n")
        assert terminal.wait() == code
        assert kvrun_command("ls", "-q").out.split() == left


def test_env(kvrun_command: Run, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("KVRUN_API_KEY", "hidden")
    monkeypatch.setenv("KVRUN_THREADS", "3")
    done = kvrun_command("env")
    assert done.code == 0
    for text in ("kvrun ", "torch ", "memory ", str(cache), "KVRUN_THREADS", "HF_TOKEN"):
        assert text in done.out
    assert "hf_secret" not in done.out
    assert "hidden" not in done.out
    told = json.loads(kvrun_command("env", "--json").out)
    assert told["environment"]["HF_TOKEN"] == "set"
    assert told["versions"]["kvrun"] == kvrun.__version__
    assert told["optional"]["opentelemetry"] == version("opentelemetry-sdk")


def test_env_says_how_to_get_what_is_missing(
    kvrun_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env, "_version", lambda name: None)
    told = json.loads(kvrun_command("env", "--json").out)
    assert told["optional"]["opentelemetry"] == "missing: pip install 'kvrun[otel]'"
    assert told["optional"]["PIL"] == "missing: pip install 'kvrun[vision]'"
    assert told["versions"]["torch"] == "missing"


def test_env_looks_for_every_extra() -> None:
    assert env.FOR_EXTRAS.keys() == EXTRAS.keys()


def test_env_compile(kvrun_command: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    done = kvrun_command("env", "--compile")
    assert done.code == 4
    assert "pip install 'kvrun[cuda]'" in done.err
    fake_flashinfer.install(monkeypatch, tmp_path)
    done = kvrun_command("env", "--compile", "--only", "bf16-128")
    fake_flashinfer.uninstall()
    assert done.code == 4
    assert "sees no CUDA device" in done.err
    assert kvrun_command("env", "--only", "bf16-128").code == 2


def served(hub: Hub, model: Path) -> None:
    """A repository that the scripted engine can chat with."""
    files = {path.name: path.read_bytes() for path in model.iterdir()}
    hub.add("org/chat", files | {"model.safetensors": b"x"})


def test_chat_says_how_to_pull_where_nobody_can_be_asked(hub: Hub, kvrun_command: Run) -> None:
    for words in (["chat", "-m", "org/m", "hi"], ["serve", "org/m"], ["bench", "micro", "org/m"]):
        done = kvrun_command(*words)
        assert done.code == 3
        assert "kvrun pull org/m" in done.err
    assert not hub.asked


def test_chat_pulls_by_yes(hub: Hub, kvrun_command: Run, model: Path) -> None:
    served(hub, model)
    done = kvrun_command("chat", "--yes", "-m", "org/chat", "hi")
    assert done.code == 0, done.err
    assert "org/chat is complete" in done.err
    assert "pulling" not in done.out
    assert done.out


def test_serve_and_bench_pull_by_yes(
    hub: Hub, kvrun_command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = []
    monkeypatch.setattr("kvrun.cli.serve._run", lambda settings, config: reached.append(config))
    assert kvrun_command("serve", "-y", "org/m").code == 0
    assert Path(reached[0].model).is_dir()
    hub.add("org/n", MODEL)
    monkeypatch.setattr("kvrun.bench.run.micro", lambda subject, *rest, **more: None)
    done = kvrun_command("bench", "micro", "-y", "org/n")
    assert done.code == 0
    assert "org/n is complete" in done.err


def test_chat_asks_in_a_terminal(
    hub: Hub, in_terminal: Callable[..., Terminal], model: Path, cache: Path
) -> None:
    served(hub, model)
    terminal = in_terminal("chat", "-m", "org/chat", "hi")
    terminal.expect("'org/chat' is not on this machine. Pull it? [y/N]")
    terminal.type("n\n")
    assert terminal.wait() == 3
    assert "kvrun pull org/chat" in terminal.seen
    assert not cache.exists()
    terminal = in_terminal("chat", "-m", "org/chat", "hi")
    terminal.expect("[y/N]")
    terminal.type("y\n")
    terminal.expect("org/chat is complete")
    assert terminal.wait() == 0


def test_bars_in_a_terminal(hub: Hub, in_terminal: Callable[..., Terminal]) -> None:
    terminal = in_terminal("pull", "org/m")
    terminal.expect("all files")
    terminal.expect("org/m is complete")
    assert terminal.wait() == 0
    assert "\x1b[" in terminal.seen
    plain = in_terminal("pull", "org/m", "--no-progress")
    assert plain.wait() == 0
    assert "all files" not in plain.seen


def test_ctrl_c_says_how_to_go_on(hub: Hub, in_terminal: Callable[..., Terminal]) -> None:
    gate = threading.Event()
    hub.faults.append(Fault("model.safetensors", hold=gate))
    terminal = in_terminal("pull", "org/m")
    terminal.until(hub.started)
    terminal.type("\x03")
    try:
        terminal.expect("kvrun pull org/m goes on from here")
        assert terminal.wait() == 130
    finally:
        gate.set()


def test_lines_say_how_far_a_long_file_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 10.0, 40.0])
    monkeypatch.setattr(_transfer.time, "monotonic", lambda: next(now))
    lines = _transfer.Lines()
    lines.begin([File("a", 100_000_000, "", None)])
    lines.have("a", 20_000_000)
    lines.add("a", 10_000_000)
    assert capsys.readouterr().err == ""
    lines.add("a", 30_000_000)
    assert capsys.readouterr().err == "60.0 MB of 100 MB, 1.0 MB/s, 40 s left\n"


def test_nothing_of_the_network_is_imported_for_what_is_here() -> None:
    code = (
        "import sys; from kvrun.cli import main\n"
        "for words in (['ls'], ['show'], ['pull', '--list']):\n"
        "    try: main(words)\n"
        "    except SystemExit as end: assert not end.code\n"
        "print({'huggingface_hub', 'torch', 'transformers', 'httpx'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
        | {"PYTHONPATH": str(Path(kvrun.__path__[0]).parent)},
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "set()"


def test_show_says_whose_code_runs_a_model(kvrun_command: Run, tmp_path: Path) -> None:
    source = Path(kvrun.__path__[0]) / "tiny"
    (tmp_path / "model.safetensors").symlink_to(source / "model.safetensors")
    told = {}
    for kind in ("apertus", "jamba"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        told[kind] = json.loads(kvrun_command("show", str(tmp_path), "--json").out)
    assert told["apertus"]["runs_by"] == "transformers"
    assert told["apertus"]["supported"] is True
    assert (told["jamba"]["runs_by"], told["jamba"]["supported"]) == (None, False)
    assert "keep a state" in told["jamba"]["refused"]
    assert "jamba (kvrun does not know it): its layers" in kvrun_command("show", str(tmp_path)).out
