"""kvrun.hub.remote against a Hub: what is taken, where it lies, and every refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download, try_to_load_from_cache

from kvrun.errors import (
    BadCheckpoint,
    InvalidRequest,
    KvrunError,
    NotFound,
    Unreachable,
    Unsupported,
)
from kvrun.hub import local, remote, transfer
from tests.hub.conftest import MODEL, WEIGHTS
from tests.hub.server import Fault, Hub, git_oid, sha256

UNWANTED = {
    "modeling_m.py": b"import os", "pytorch_model.bin": b"pickle", "flax_model.msgpack": b"x",
    "onnx/model.onnx": b"x", "training_args.bin": b"pickle", "consolidated.safetensors": b"x",
    ".gitattributes": b"x", "picture.png": b"x", "original/params.json": b"{}",
}  # fmt: skip


class Witness:
    """Keeps what a pull says, and counts bytes."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.count = 0
        self.total = 0

    def begin(self, files: list[Any]) -> None:
        self.total = sum(file.size for file in files)

    def add(self, name: str, count: int) -> None:
        self.count += count

    def have(self, name: str, count: int) -> None:
        self.count += count

    def end(self, name: str) -> None:
        self.said.append(name)

    def say(self, text: str) -> None:
        self.said.append(text)


def pull(name: str = "org/m", **options: Any) -> Path:
    return remote.pull(remote.look(name, **options), Witness())


def refused(name: str, kind: type[KvrunError], **options: Any) -> KvrunError:
    with pytest.raises(kind) as error:
        pull(name, **options)
    assert type(error.value) is kind
    return error.value


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_model_is_taken_without_code_and_pickles(hub: Hub, cache: Path) -> None:
    commit = hub.add("org/full", MODEL | UNWANTED)
    folder = pull("org/full")
    assert folder == cache / "models--org--full" / "snapshots" / commit
    assert contents(folder) == MODEL
    assert local.resolve("org/full") == folder
    assert local.resolve("org/full@main") == folder


def test_the_cache_is_the_one_of_huggingface_hub(hub: Hub, cache: Path) -> None:
    folder = pull()
    blobs = {path.name for path in (cache / "models--org--m" / "blobs").iterdir()}
    assert blobs == {sha256(d) if n.endswith("s") else git_oid(d) for n, d in MODEL.items()}
    assert all(path.is_symlink() and not path.readlink().is_absolute() for path in folder.iterdir())
    assert try_to_load_from_cache("org/m", "config.json", cache) == str(folder / "config.json")
    asked = len(hub.asked)
    assert snapshot_download("org/m", cache_dir=cache, local_files_only=True) == str(folder)
    assert len(hub.asked) == asked


def test_what_huggingface_hub_has_fetched_is_used(hub: Hub, cache: Path) -> None:
    folder = snapshot_download("org/m", cache_dir=cache, endpoint=hub.url)
    before = dict(hub.sent)
    assert str(pull()) == folder
    assert hub.sent == before


def test_a_second_pull_fetches_nothing(hub: Hub) -> None:
    pull()
    before = dict(hub.sent)
    offer = remote.look("org/m")
    assert offer.missing == ()
    assert offer.to_fetch == 0
    pull()
    assert hub.sent == before


def test_what_is_shown_adds_up(hub: Hub) -> None:
    watch = Witness()
    remote.pull(remote.look("org/m"), watch)
    assert watch.count == watch.total == sum(map(len, MODEL.values()))
    assert sorted(watch.said) == sorted(MODEL)


def test_looking_fetches_and_writes_nothing(hub: Hub, cache: Path) -> None:
    offer = remote.look("org/m")
    assert [(f.name, f.size) for f in offer.files] == [(n, len(MODEL[n])) for n in sorted(MODEL)]
    assert offer.size == offer.to_fetch == sum(map(len, MODEL.values()))
    assert not hub.sent
    assert not cache.exists()


def test_include_and_exclude(hub: Hub) -> None:
    hub.add("org/full", MODEL | UNWANTED)
    names = [f.name for f in remote.look("org/full", include=["*.json", "*.py", "*.bin"]).files]
    assert names == ["config.json", "original/params.json", "tokenizer.json"]
    names = [f.name for f in remote.look("org/full", exclude=["*.md", "*.safetensors"]).files]
    assert names == ["config.json", "tokenizer.json"]
    assert contents(pull("org/full", include=["original/"])) == {"original/params.json": b"{}"}
    assert "no file" in refused("org/full", NotFound, include=["*.py"]).what


def test_a_part_of_a_model_is_not_taken_for_a_model(hub: Hub) -> None:
    pull(exclude=["*.safetensors"])
    with pytest.raises(BadCheckpoint, match="not downloaded completely"):
        local.resolve("org/m")
    pull()
    assert local.resolve("org/m")


def test_shards_are_those_of_the_index(hub: Hub) -> None:
    shards = {f"model-0000{n}-of-00002.safetensors": WEIGHTS[:n] for n in (1, 2)}
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    files = {"config.json": b"{}", "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("org/shards", files | shards | {"model-00001-of-00009.safetensors": b"old"})
    assert contents(pull("org/shards")) == files | shards
    assert local.resolve("org/shards")
    lost = {name: data for name, data in shards.items() if "00002-of" not in name}
    hub.add("org/lost", files | lost)
    assert "00002" in refused("org/lost", BadCheckpoint).cause


def test_revisions(hub: Hub, cache: Path) -> None:
    old = hub.repos["org/m"].branches["main"]
    new = hub.add("org/m", MODEL | {"README.md": b"# newer"})
    hub.repos["org/m"].branches["v1"] = old
    assert pull("org/m@v1").name == old
    assert pull(f"org/m@{old}").name == old
    assert sorted(p.name for p in (cache / "models--org--m" / "refs").iterdir()) == ["v1"]
    before = hub.sent["model.safetensors"]
    assert pull("org/m").name == new
    assert hub.sent["model.safetensors"] == before  # the same bytes lie there once
    error = refused("org/m@v9", NotFound)
    assert "no revision 'v9'" in error.what


def test_an_older_snapshot_serves_until_the_newer_is_complete(hub: Hub) -> None:
    folder = pull()
    hub.add("org/m", MODEL | {"model.safetensors": WEIGHTS[1:]})
    hub.faults.append(Fault("model.safetensors", flip=True, times=9))
    refused("org/m", BadCheckpoint)
    assert local.resolve("org/m") == folder


def test_an_adapter(hub: Hub) -> None:
    files = {"adapter_config.json": b'{"base_model_name_or_path": "org/m"}'}
    hub.add("org/a", files | {"adapter_model.safetensors": b"x", "training_args.bin": b"p"})
    assert contents(pull("org/a")) == files | {"adapter_model.safetensors": b"x"}


@pytest.mark.parametrize(
    ("file", "said"), [("m.gguf", "GGUF"), ("weights.safetensors", "another name"), ("a", "no w")]
)
def test_weights_of_other_kinds(hub: Hub, file: str, said: str) -> None:
    hub.add("org/other", {"config.json": b"{}", file: b"x"})
    assert said in refused("org/other", Unsupported).what


def test_gated(hub: Hub, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    hub.add("org/gated", MODEL, gated=True)
    hub.tokens = {"hf_good": {"org/gated"}, "hf_other": set()}
    error = refused("org/gated", NotFound)
    assert "is gated" in error.what
    assert f"{hub.url}/org/gated" in error.hint
    assert "HF_TOKEN" in error.hint
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    error = refused("org/gated", NotFound)
    assert "no access" in error.what
    assert f"{hub.url}/org/gated" in error.hint
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "not accepted" in refused("org/gated", NotFound).what
    assert not (cache / "models--org--gated" / "refs").exists()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_good")
    assert contents(pull("org/gated")) == MODEL


def test_the_token_goes_to_the_hub_and_not_to_its_storage(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", MODEL, gated=True)
    hub.tokens = {"hf_good": {"org/gated"}}
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    pull("org/gated")
    for method, path, headers in hub.asked:
        if path.startswith("/body/") and headers:
            assert "authorization" not in headers, path
        elif headers:
            assert headers["authorization"] == "Bearer hf_good", (method, path)
    assert hub.gets("model.safetensors")


def test_nothing_but_the_model_is_asked_for(hub: Hub) -> None:
    pull()
    assert {path.split("/")[1] for _, path, _ in hub.asked} == {"api", "org", "body"}
    assert not [
        path for _, path, _ in hub.asked if path.startswith("/api/") and "org/m" not in path
    ]
    assert all("torch" not in h.get("user-agent", "") for _, _, h in hub.asked)


def test_what_is_not_there(hub: Hub) -> None:
    error = refused("org/nothing", NotFound)
    assert "not on" in error.what
    assert "private" in error.hint
    pull()
    assert "org/m" in refused("orgg/m", NotFound).hint
    assert "Qwen/Qwen3-0.6B" in refused("Qwen/Qwen3-0.6", NotFound).hint
    for name in ("m", "a b/c", "org/../m", "/tmp", "tiny"):
        refused(name, InvalidRequest)


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert variable in refused("org/m", Unreachable).hint
    assert not hub.asked


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    error = refused("org/m", Unreachable)
    assert "http://127.0.0.1:9 cannot be reached" in error.what
    assert "HF_ENDPOINT" in error.hint


def test_large_files_are_left_to_huggingface_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "LARGEST", len(WEIGHTS) - 1)
    watch = Witness()
    folder = remote.pull(remote.look("org/m"), watch)
    assert contents(folder) == MODEL
    assert [text for text in watch.said if "hf_xet" in text]
