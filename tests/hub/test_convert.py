"""Pickled weights -> safetensors, other tokenizers -> tokenizer.json, in limited processes."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from kvrun.errors import BadCheckpoint, KvrunError, MissingExtra, NotFound
from kvrun.hub import choose, complete, convert, local, remote
from tests.hub.server import Hub
from tests.hub.test_pull import Witness, pull

SHARED = torch.arange(12, dtype=torch.float32).view(3, 4)
STATE = {
    "embed.weight": SHARED,
    "half": torch.randn(5, 7).bfloat16(),
    "turned": torch.randn(4, 6).t(),
    "one": torch.tensor(3.5, dtype=torch.float16),
    "none": torch.empty(0, 4),
    "mask": torch.tensor([True, False, True]),
    "count": torch.tensor([2**40], dtype=torch.int64),
    "lm_head.weight": SHARED,
}


def folder_with(tmp_path: Path, **files: Any) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        if isinstance(content, str):
            path.write_text(content)
        else:
            torch.save(content, path)
    return folder


def run(folder: Path) -> tuple[list[str], list[str]]:
    said: list[str] = []
    return complete.complete(folder, said.append), said


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(
        found[n].dtype == t.dtype and found[n].shape == t.shape and torch.equal(found[n], t)
        for n, t in wanted.items()
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_tensors_stay_what_they_are(tmp_path: Path, zipped: bool) -> None:
    torch.save(STATE, tmp_path / "a.bin", _use_new_zipfile_serialization=zipped)
    convert.write(tmp_path / "a.safetensors", convert.read(tmp_path / "a.bin"))
    # Of two names for the same memory the first stays: a model without a head is a tied one.
    wanted = {name: t for name, t in STATE.items() if name != "lm_head.weight"}
    assert same(load_file(tmp_path / "a.safetensors"), wanted)


def test_a_folder_is_converted_and_keeps_its_files(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, pytorch_model__bin={"w": SHARED})
    before = (folder / choose.BIN).read_bytes()
    made, said = run(folder)
    assert made == [choose.SAFE]
    assert said == [f"writing {choose.BIN} as safetensors"]
    assert torch.equal(load_file(folder / choose.SAFE)["w"], SHARED)
    assert (folder / choose.BIN).read_bytes() == before
    assert run(folder) == ([], [])


def test_shards_and_their_index(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{n}-of-00002.bin" for n in (1, 2)]
    index = json.dumps({"weight_map": {"a": names[0], "b": names[1]}})
    folder = folder_with(tmp_path, **{choose.BIN_INDEX: index})
    torch.save({"a": SHARED}, folder / names[0])
    torch.save({"b": SHARED + 1}, folder / names[1])
    made, _ = run(folder)
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert made == [*shards, choose.SAFE_INDEX]
    written = json.loads((folder / choose.SAFE_INDEX).read_text())
    assert written["weight_map"] == {"a": shards[0], "b": shards[1]}
    assert written["metadata"]["total_size"] == 2 * SHARED.nbytes
    assert torch.equal(load_file(folder / shards[1])["b"], SHARED + 1)


def test_an_adapter(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, adapter_model__bin={"lora_A": SHARED})
    assert convert.sources(folder) == [choose.ADAPTER_BIN]
    assert convert.target(choose.ADAPTER_BIN) == choose.ADAPTER


class Evil:
    """What runs a command when it is unpickled without care."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


def test_what_could_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "torch.py").write_text("open('ran', 'w')")  # of the folder one happens to be in
    folder = folder_with(tmp_path, pytorch_model__bin={"a": SHARED, "b": Evil()})
    with pytest.raises(BadCheckpoint) as error:
        run(folder)
    assert "posix.system" in error.value.cause
    assert not list(tmp_path.rglob("ran"))
    assert {path.name for path in folder.iterdir()} == {"config.json", choose.BIN}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ([SHARED], "no tensors by name"),
        ({}, "no tensors by name"),
        ({"a": {"b": SHARED}}, "more than tensors: a"),
        ({"a": 3}, "more than tensors: a"),
        ({3: SHARED}, "more than tensors: 3"),
        ({"a": SHARED.to_sparse()}, "sparse"),
        ({"a": SHARED.to(torch.complex64)}, "complex64"),
    ],
)
def test_what_is_no_table_of_tensors(tmp_path: Path, value: Any, said: str) -> None:
    torch.save(value, tmp_path / "a.bin")
    with pytest.raises(convert.Refused, match=said):
        convert.read(tmp_path / "a.bin")


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"PK\x03\x04 cut", b"text"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(convert.Refused, match="damaged"):
        convert.read(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": "../x.bin"}}',
              '{"weight_map": {"a": "lost.bin"}}']
)  # fmt: skip
def test_an_index_that_cannot_be_right(tmp_path: Path, index: str) -> None:
    folder = folder_with(tmp_path, **{choose.BIN_INDEX: index})
    (tmp_path / "x.bin").touch()
    with pytest.raises(convert.Refused, match="index"):
        convert.sources(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory there is")
def test_memory_is_limited(tmp_path: Path) -> None:
    # A tensor that claims 16 GB in a file of a few hundred bytes.
    folder = folder_with(tmp_path, pytorch_model__bin={"a": torch.zeros(1).expand(4 << 30)})
    assert (folder / choose.BIN).stat().st_size < 10_000
    with pytest.raises(KvrunError, match="more memory"):
        run(folder)
    assert {path.name for path in folder.iterdir()} == {"config.json", choose.BIN}


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no model"):
        run(tmp_path)
    with pytest.raises(NotFound, match="no weights"):
        run(folder_with(tmp_path))


def test_a_tokenizer_is_completed(tmp_path: Path) -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    folder = folder_with(
        tmp_path, pytorch_model__bin={"w": SHARED}, vocab__json=json.dumps(vocab),
        merges__txt="#version: 0.2\na b\n",
    )  # fmt: skip
    made, _ = run(folder)
    assert made == [choose.SAFE, "tokenizer.json"]
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("abb").ids == [2, 1]


def test_a_tokenizer_that_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with(tmp_path, tokenizer__model="", pytorch_model__bin={"w": SHARED})
    (folder / choose.SAFE).touch()
    monkeypatch.setattr(complete, "_run", lambda *args: {"package": True})
    with pytest.raises(MissingExtra) as error:
        run(folder)
    assert "pip install sentencepiece" in error.value.hint
    assert not list(folder.glob(f"{complete.STAGING}*"))


def test_a_tokenizer_that_is_code_is_not_run(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, pytorch_model__bin={"w": SHARED})
    (folder / "config.json").write_text('{"model_type": "own"}')
    settings = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    made, said = run(folder)
    assert made == [choose.SAFE]
    assert "never run" in said[-1]
    assert not (tmp_path / "ran").exists()


def test_a_pull_converts_and_keeps_no_pickles(hub: Hub, tmp_path: Path, cache: Path) -> None:
    torch.save({"w": SHARED}, tmp_path / "a.bin")
    data = (tmp_path / "a.bin").read_bytes()
    hub.add("org/old", {"config.json": b'{"model_type": "llama"}', choose.BIN: data})
    offer = remote.look("org/old")
    assert offer.to_convert == len(data)
    watch = Witness()
    folder = remote.pull(offer, watch)
    assert watch.said[-1] == f"writing {choose.BIN} as safetensors"
    assert {path.name for path in folder.iterdir()} == {"config.json", choose.SAFE}
    assert len(list((cache / "models--org--old" / "blobs").iterdir())) == 1
    assert local.resolve("org/old") == folder
    sent = hub.sent[choose.BIN]
    assert pull("org/old") == folder
    assert hub.sent[choose.BIN] == sent


def test_a_pull_that_cannot_convert_leaves_no_model(hub: Hub, cache: Path) -> None:
    hub.add("org/old", {"config.json": b'{"model_type": "llama"}', choose.BIN: b"damaged"})
    with pytest.raises(BadCheckpoint, match="cannot be converted"):
        pull("org/old")
    assert not list((cache / "models--org--old").glob("refs/*"))
    with pytest.raises(BadCheckpoint, match="not downloaded completely"):
        local.resolve("org/old")
