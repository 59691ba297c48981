"""What kvrun ls and kvrun rm see of the Hugging Face cache."""

from pathlib import Path

import pytest

from kvrun.errors import InvalidRequest, KvrunError, NotFound
from kvrun.hub import cache as shelf
from kvrun.hub import local
from tests.hub.conftest import MODEL, WEIGHTS
from tests.hub.server import Fault, Hub
from tests.hub.test_pull import contents, pull


def by_name() -> dict[str, shelf.Entry]:
    return {entry.name: entry for entry in shelf.entries() if entry.name not in local.BUILTIN}


def test_an_empty_cache(cache: Path) -> None:
    assert [entry.name for entry in shelf.entries()] == ["tiny"]


def test_models_adapters_and_parts(hub: Hub) -> None:
    folder = pull()
    base = b'{"base_model_name_or_path": "org/m"}'
    hub.add("org/a", {"adapter_config.json": base, "adapter_model.safetensors": b"x"})
    adapter = pull("org/a")
    hub.add("org/cut", MODEL | {"model.safetensors": WEIGHTS[1:]})
    hub.faults.append(Fault("model.safetensors", status=404))
    with pytest.raises(KvrunError):
        pull("org/cut")
    found = by_name()
    assert {name: (e.kind, e.lacks) for name, e in found.items()} == {
        "org/m": ("model", ""),
        "org/a": ("adapter", ""),
        "org/cut": ("part", "config.json"),
    }
    assert found["org/m"].folder == folder
    assert found["org/m"].bytes == sum(map(len, MODEL.values())) + len(folder.name)
    assert found["org/m"].revisions == ("main",)
    assert shelf.base_of(adapter) == "org/m"
    assert shelf.base_of(folder) is None


def test_a_folder_of_the_same_name_does_not_matter(hub: Hub, tmp_path: Path) -> None:
    pull()
    (tmp_path / "org" / "m").mkdir(parents=True)
    assert by_name()["org/m"].lacks == ""


def test_removing_a_model(hub: Hub, cache: Path) -> None:
    pull()
    hub.add("org/other", MODEL)
    pull("org/other")
    used = by_name()["org/m"].bytes
    assert shelf.remove("org/m") == used
    assert list(by_name()) == ["org/other"]
    assert not [path for path in cache.rglob("*") if "org--m" in str(path)]
    assert local.resolve("org/other")


def test_removing_a_part_of_a_download(hub: Hub, cache: Path) -> None:
    (cache / "models--org--m" / "blobs").mkdir(parents=True)
    (cache / "models--org--m" / "blobs" / "0.incomplete").write_bytes(b"12345")
    assert by_name()["org/m"].kind == "part"
    assert shelf.remove("org/m") == 5
    assert by_name() == {}


def test_removing_one_revision_keeps_what_the_other_needs(hub: Hub, cache: Path) -> None:
    old = pull()
    new_files = MODEL | {"tokenizer.json": b'{"version": "2.0"}'}
    hub.add("org/m", new_files)
    new = pull()
    assert set(by_name()) == {"org/m", f"org/m@{old.name[:8]}"}
    freed = shelf.remove(f"org/m@{old.name[:8]}")
    assert freed == len(MODEL["tokenizer.json"])
    assert not old.exists()
    assert contents(new) == new_files
    assert local.resolve("org/m") == new
    assert list(by_name()) == ["org/m"]
    shelf.remove("org/m@main")  # the last one: nothing stays
    assert not (cache / "models--org--m").exists()


def test_what_is_not_removed(hub: Hub, tmp_path: Path) -> None:
    pull()
    (tmp_path / "mine").mkdir()
    for name, kind, said in [
        ("tiny", InvalidRequest, "part of kvrun"),
        ("mine", InvalidRequest, "of your own"),
        ("org/none", NotFound, "is not in"),
        ("org/m@v9", NotFound, "no revision 'v9'"),
        ("../cache", NotFound, "is not in"),
        ("org/m@../..", NotFound, "no revision"),
        ("x" * 5000, NotFound, "is not in"),
    ]:
        with pytest.raises(kind, match=said) as error:
            shelf.remove(name)
        assert error.value.hint
    assert "org/m" in by_name()
