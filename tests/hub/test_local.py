"""Names of models: folders, the built-in, the HF cache; every way to be wrong says what to do."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvrun.errors import BadCheckpoint, KvrunError, NotFound, Unsupported
from kvrun.hub import complete, local

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"
FILES = ("config.json", "model.safetensors")
Download = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


@pytest.fixture
def download(cache: Path) -> Download:
    """download(repo, commit, reference, *files): what HF's tools leave, blobs and links."""

    def make(repo: str, *files: str, commit: str = COMMIT, reference: str | None = "main") -> Path:
        root = cache / ("models--" + repo.replace("/", "--"))
        snapshot = root / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (root / "blobs").mkdir(exist_ok=True)
        for name in files or FILES:
            blob = root / "blobs" / f"{commit[:4]}{name}"
            blob.write_bytes(b"{}")
            (snapshot / name).symlink_to(blob)
        if reference:
            (root / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
            (root / "refs" / reference).write_text(commit)
        return snapshot

    return make


def refused(name: str, kind: type[KvrunError] = NotFound) -> KvrunError:
    with pytest.raises(kind) as error:
        local.resolve(name)
    assert type(error.value) is kind
    assert error.value.hint
    return error.value


def test_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    assert "no config.json" in refused(str(folder)).what
    (folder / "config.json").write_text("{}")
    assert local.resolve("my model") == folder
    assert local.resolve("./my model/") == folder
    assert local.is_model_name("my model")


def test_a_file_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_text("")
    assert "is a file" in refused("./model.bin").what
    assert "no folder ./nothing" in refused("./nothing").what
    assert "no folder /nothing/at/all" in refused("/nothing/at/all").what
    assert not local.is_model_name("model.bin")


def test_gguf_is_named(tmp_path: Path) -> None:
    """A file, or a folder with no other model in it; the way to one that is read is said."""
    folder = tmp_path / "its folder"
    folder.mkdir()
    (folder / "small.q4.gguf").write_text("")
    for name in (str(folder), str(folder / "small.q4.gguf")):
        error = refused(name, Unsupported)
        assert error.what.startswith("small.q4.gguf is GGUF")
        assert "safetensors" in (error.hint or "")
    with pytest.raises(Unsupported, match="is GGUF"):
        complete.lacks(folder)
    (folder / "config.json").write_text("{}")
    assert local.resolve(str(folder)) == folder


def test_gguf_beside_an_adapter_is_no_hindrance(tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors", "adapter.gguf"):
        (tmp_path / name).write_text("{}")
    assert complete.lacks(tmp_path) == []


def test_the_built_in_model_wins_over_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "package" / "tiny"
    for folder in (inside, tmp_path / "tiny"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    monkeypatch.setitem(local.BUILTIN, "tiny", inside)
    assert local.resolve("tiny") == inside
    assert local.resolve("./tiny") == tmp_path / "tiny"
    assert local.is_model_name("tiny")
    (inside / "config.json").unlink()
    assert "built-in model 'tiny' has no config.json" in refused("tiny").what


def test_the_table_names_folders_of_the_package() -> None:
    assert local.builtin_names() == ["tiny"]
    for folder in local.BUILTIN.values():
        assert folder.parent == Path(local.__file__).parents[1]


def test_a_cached_model(download: Download) -> None:
    snapshot = download("org/Model-1.5")
    assert local.resolve("org/Model-1.5") == snapshot
    assert local.resolve("org/Model-1.5@main") == snapshot
    assert local.resolve(f"org/Model-1.5@{COMMIT}") == snapshot
    assert local.resolve(f"org/Model-1.5@{COMMIT[:8]}") == snapshot
    assert "kvrun pull org/Model-1.5@v2" in refused("org/Model-1.5@v2").hint


def test_a_name_without_organisation(download: Download) -> None:
    assert not local.is_model_name("gpt2")
    snapshot = download("gpt2")
    assert local.resolve("gpt2") == snapshot
    assert local.is_model_name("gpt2")


def test_revisions(download: Download) -> None:
    main = download("org/m")
    tagged = download("org/m", commit=OTHER, reference="refs/pr/1")
    assert local.resolve("org/m") == main
    assert local.resolve("org/m@refs/pr/1") == tagged
    assert local.resolve(f"org/m@{OTHER[:7]}") == tagged


def test_the_only_commit_serves_without_a_branch(download: Download) -> None:
    snapshot = download("org/m", reference=None)
    assert local.resolve("org/m") == snapshot
    download("org/m", commit=OTHER, reference=None)
    assert "complete download" in refused("org/m").cause


@pytest.mark.parametrize("content", ["../refs", "", "main\0", "zz"])
def test_a_reference_that_is_no_commit_is_not_followed(download: Download, content: str) -> None:
    snapshot = download("org/m")
    download("org/m", commit=OTHER, reference=None)
    (snapshot.parents[1] / "refs" / "main").write_text(content)
    refused("org/m")


@pytest.mark.parametrize(
    ("files", "missing"),
    [
        (("model.safetensors",), "config.json"),
        (("config.json",), "weights"),
        (("config.json", "model.safetensors.index.json", "a.safetensors"), "b.safetensors"),
    ],
)
def test_an_incomplete_download(download: Download, files: tuple[str, ...], missing: str) -> None:
    snapshot = download("org/m", *files)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    if len(files) == 3:
        (snapshot / files[1]).write_text(json.dumps(index))
    error = refused("org/m", BadCheckpoint)
    assert missing in error.cause
    assert error.hint == "kvrun pull org/m"


def test_a_link_to_a_blob_that_is_not_there_yet(download: Download) -> None:
    snapshot = download("org/m")
    (snapshot / "model.safetensors").resolve().unlink()
    assert "weights" in refused("org/m", BadCheckpoint).cause


def test_a_link_to_a_shard_that_is_not_there_yet(download: Download) -> None:
    shards = ("a.safetensors", "b.safetensors")
    snapshot = download("org/m", "config.json", "model.safetensors.index.json", *shards)
    index = {"weight_map": dict(zip("xy", shards, strict=True))}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert local.resolve("org/m") == snapshot
    (snapshot / "b.safetensors").resolve().unlink()
    assert "b.safetensors" in refused("org/m", BadCheckpoint).cause


def test_shards_without_the_list_of_them(download: Download) -> None:
    download("org/m", "config.json", "model-00001-of-00002.safetensors")
    assert "index.json" in refused("org/m", BadCheckpoint).cause


def test_what_can_be_pulled(tmp_path: Path) -> None:
    assert local.is_pullable("org/m")
    assert local.is_pullable("org/m@v1")
    for name in ("tiny", "gpt2", "/org/m", "a/b/c", "org/../m", "what is 1/2"):
        assert not local.is_pullable(name)
    (tmp_path / "org" / "m").mkdir(parents=True)
    assert not local.is_pullable("org/m")


def test_a_damaged_index(download: Download) -> None:
    snapshot = download("org/m", *FILES, "model.safetensors.index.json")
    for content in ("{", "[]", '{"weight_map": 3}', "{}"):
        (snapshot / "model.safetensors.index.json").write_text(content)
        with pytest.raises(BadCheckpoint, match=r"index\.json cannot be read"):
            local.resolve("org/m")


def test_weights_of_another_kind(download: Download) -> None:
    download("org/m", "config.json", "pytorch_model.bin")
    refused("org/m", Unsupported)


def test_unknown_names(download: Download) -> None:
    download("meta-llama/Llama-3.2-1B")
    assert refused("org/other").hint == "kvrun pull org/other"
    assert "meta-llama/Llama-3.2-1B" in refused("meta-lama/Llama-3.2-1B").hint
    assert "'tiny'" in refused("tny").hint
    assert "ORG/NAME" in refused("zzzzzz").hint


@pytest.mark.parametrize(
    "name",
    ["", "a/b/c", "org/../m", "a..b/m", "org--x/m", "hello there", "~nobody-here/m", "x" * 5000,
     "a\0b", "org/m@", "org/m@../x", "@main", "-m", ".hidden", "a/.b", "ä/b", "org/m\n"],
    ids=lambda name: repr(name[:12]),
)  # fmt: skip
def test_what_is_no_name(name: str) -> None:
    assert not local.is_model_name(name)
    assert len(refused(name).what) < 200


def test_which_words_are_models() -> None:
    assert local.is_model_name("org/name")
    assert local.is_model_name("org/name@v1.0")
    for prompt in ("hello", "What is 12 + 30?", "and/or not", "1/2/3", "https://x.org/a"):
        assert not local.is_model_name(prompt)


def test_near_names(download: Download) -> None:
    download("meta-llama/Llama-3.2-1B")
    download("Qwen/Qwen3-0.6B")
    assert local.cached_names() == ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B"]
    assert local.near("tny") == ["tiny"]
    assert local.near("Tiny") == ["tiny"]
    assert local.near("qwen3-06b")[0] == "Qwen/Qwen3-0.6B"
    assert local.near("meta/Llama3.2-1B@main")[0] == "meta-llama/Llama-3.2-1B"
    for prompt in ("hello", "hi", "why", "time", "tell me about tiny", ""):
        assert local.near(prompt) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    steps = [
        ("HF_HUB_CACHE", "/a", Path("/a")),
        ("HUGGINGFACE_HUB_CACHE", "/b", Path("/b")),
        ("HF_HOME", "/c", Path("/c/hub")),
        ("XDG_CACHE_HOME", "/d", Path("/d/huggingface/hub")),
    ]
    for variable, value, _ in steps:
        monkeypatch.setenv(variable, value)
    for variable, _, expected in steps:
        assert local.cache_root() == expected
        monkeypatch.delenv(variable)
    assert local.cache_root() == tmp_path / ".cache" / "huggingface" / "hub"
    assert local.cached_names() == []


def test_no_network_library_is_imported() -> None:
    code = (
        "import sys; from kvrun.hub.local import cached_names, near; near('x'); cached_names();"
        "print({'huggingface_hub', 'requests', 'httpx', 'socket', 'torch'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
