"""The fault rows of models on disk: what is promised when a pull goes wrong, a test for each."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import psutil
import pytest
import torch

from kvrun.errors import BadCheckpoint, KvrunError, Unreachable
from kvrun.hub import choose, local, remote, transfer
from kvrun.hub.complete import STAGING, _sweep
from tests.hub.conftest import MODEL, ROOT, WEIGHTS
from tests.hub.server import Fault, Hub, sha256
from tests.hub.test_pull import Witness, contents, pull, refused

BLOB = sha256(WEIGHTS)
Start = Callable[..., "subprocess.Popen[str]"]


def blobs(cache: Path) -> Path:
    return cache / "models--org--m" / "blobs"


def end(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_d1_killed_in_the_middle_it_goes_on_from_there(hub: Hub, cache: Path, kvrun: Start) -> None:
    data = WEIGHTS * 10  # more than is read at once
    hub.add("org/m", MODEL | {"model.safetensors": data})
    hub.faults.append(Fault("model.safetensors", hold=threading.Event()))
    process = kvrun("pull", "org/m")
    assert hub.started.wait(30)
    part = blobs(cache) / f"{sha256(data)}.incomplete"
    while not part.is_file() or part.stat().st_size < 1 << 18:
        assert process.poll() is None
    process.kill()
    end(process)
    here = part.stat().st_size
    assert 0 < here < len(data)
    hub.faults[0].hold.set()  # type: ignore[union-attr]
    code, _, err = end(kvrun("serve", "org/m"))
    assert code == 1
    assert "not downloaded completely" in err
    assert "kvrun pull org/m" in err
    code, out, err = end(kvrun("pull", "org/m"))
    assert code == 0
    assert f"{here / 1e6:.1f} MB of it here" in err or f"{here // 1000} kB of it here" in err
    assert hub.gets("model.safetensors")[-1]["range"] == f"bytes={here}-"
    assert (Path(out.strip()) / "model.safetensors").read_bytes() == data
    assert not list(blobs(cache).glob("*.incomplete"))


def test_d1_the_manifest_and_the_branch_come_last(hub: Hub, cache: Path) -> None:
    gate = threading.Event()

    class Last(Witness):
        """Lets the weights go on, to their wrong end, once config.json is here."""

        def end(self, name: str) -> None:
            if name == "config.json":
                gate.set()

    hub.faults.append(Fault("model.safetensors", hold=gate, flip=True))
    with pytest.raises(BadCheckpoint):
        remote.pull(remote.look("org/m"), Last())
    root = cache / "models--org--m"
    assert not list(root.glob("snapshots/*/config.json"))
    assert not list(root.glob("refs/*"))
    with pytest.raises(BadCheckpoint):
        local.resolve("org/m")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("model.safetensors", cut_after=100_000),
        Fault("model.safetensors", cut_after=0, times=3),
        Fault("model.safetensors", status=503, times=3),
        Fault("model.safetensors", status=429, retry_after="0", times=3),
        Fault("model.safetensors", short=1000),
        Fault("tokenizer.json", status=500),
    ],
    ids=["cut", "cut at once", "503", "429", "short", "small file"],
)
def test_d2_a_server_in_trouble_is_asked_again(hub: Hub, fault: Fault) -> None:
    hub.faults.append(fault)
    assert contents(pull()) == MODEL


def test_d2_what_has_come_is_not_fetched_again(hub: Hub) -> None:
    hub.faults.append(Fault("model.safetensors", cut_after=100_000))
    pull()
    first, second = hub.gets("model.safetensors")
    assert "range" not in first
    assert second["range"] == "bytes=100000-"
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_d2_a_server_without_ranges_sends_everything_again(hub: Hub) -> None:
    hub.faults += [
        Fault("model.safetensors", cut_after=100_000),
        Fault("model.safetensors", ignore_range=True),
    ]
    watch = Witness()
    assert contents(remote.pull(remote.look("org/m"), watch)) == MODEL
    assert hub.sent["model.safetensors"] == 100_000 + len(WEIGHTS)
    assert watch.count == watch.total


def test_d2_a_part_that_is_longer_than_the_file(hub: Hub, cache: Path) -> None:
    blobs(cache).mkdir(parents=True)
    (blobs(cache) / f"{BLOB}.incomplete").write_bytes(WEIGHTS * 2)
    assert contents(pull()) == MODEL


def test_d2_retry_after_is_honoured(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = []
    stop = SimpleNamespace(wait=lambda seconds: waited.append(seconds), is_set=lambda: False)
    monkeypatch.setattr(remote, "Event", lambda: SimpleNamespace(**vars(stop), set=lambda: None))
    hub.faults.append(Fault("model.safetensors", status=503, retry_after="7"))
    pull()
    assert waited == [7.0]


def test_d2_a_server_that_is_silent_is_left(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    forever = threading.Event()
    hub.faults.append(Fault("model.safetensors", hold=forever))
    try:
        assert contents(pull()) == MODEL
    finally:
        forever.set()


def test_d2_a_server_that_stays_in_trouble(hub: Hub, cache: Path) -> None:
    hub.faults.append(Fault("model.safetensors", status=503, times=99))
    error = refused("org/m", Unreachable)
    assert "503" in error.cause
    hub.faults[0].times = 0
    assert contents(pull()) == MODEL


def test_d3_wrong_bytes_are_thrown_away(hub: Hub, cache: Path) -> None:
    hub.faults.append(Fault("model.safetensors", flip=True))
    error = refused("org/m", BadCheckpoint)
    assert error.exit_code == 1
    assert "model.safetensors" in error.what
    assert BLOB in error.cause
    assert not list(blobs(cache).glob(f"{BLOB}*"))
    assert contents(pull()) == MODEL


def test_d3_wrong_bytes_of_a_small_file(hub: Hub) -> None:
    hub.faults.append(Fault("tokenizer.json", flip=True))
    assert "tokenizer.json" in refused("org/m", BadCheckpoint).what


def test_d3_a_part_with_wrong_bytes_is_fetched_afresh(hub: Hub, cache: Path) -> None:
    blobs(cache).mkdir(parents=True)
    (blobs(cache) / f"{BLOB}.incomplete").write_bytes(b"x" * 1000)
    assert contents(pull()) == MODEL


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ({"X-Linked-Size": "7"}, "7 by its header"),
        ({"X-Linked-Etag": '"../../escaped"'}, "ETag"),
        ({"X-Linked-Etag": f'"{"0" * 64}"'}, "other bytes"),
    ],
)
def test_d3_headers_that_cannot_be_true(hub: Hub, cache: Path, head: dict[str, str],
                                        said: str) -> None:  # fmt: skip
    hub.faults.append(Fault("model.safetensors", times=0, head=head))
    error = refused("org/m", BadCheckpoint)
    assert said in str(error)
    assert not list(cache.parent.rglob("escaped*"))


def test_d3_a_body_that_never_comes_to_its_end(hub: Hub) -> None:
    hub.faults.append(Fault("model.safetensors", short=1000, times=999, ignore_range=True))
    assert "come to its end" in refused("org/m", BadCheckpoint).what


def test_d3_a_blob_of_another_size_is_replaced(hub: Hub, cache: Path) -> None:
    folder = pull()
    (folder / "model.safetensors").resolve().write_bytes(b"cut")
    assert contents(pull()) == MODEL


def test_d4_two_pulls_at_once_are_one_download(hub: Hub, kvrun: Start) -> None:
    gate = threading.Event()
    hub.faults.append(Fault("model.safetensors", hold=gate))
    first = kvrun("pull", "org/m")
    assert hub.started.wait(30)
    second = kvrun("pull", "org/m")
    heads = [("HEAD", "model.safetensors")] * 2
    while [(m, p.rpartition("/")[2]) for m, p, _ in list(hub.asked)
           if m == "HEAD" and p.endswith("model.safetensors")] != heads:  # fmt: skip
        assert second.poll() is None
    gate.set()
    (code, out, _), (other_code, other_out, _) = end(first), end(second)
    assert (code, other_code) == (0, 0)
    assert out == other_out
    assert contents(Path(out.strip())) == MODEL
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_d5_room_is_looked_for_first(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    error = refused("org/m", KvrunError)
    assert error.exit_code == 1
    assert "needs 205 kB of disk, 100 kB are free" in error.what
    assert not hub.sent
    assert not list(cache.rglob("*.incomplete"))


def test_d5_room_for_the_converted_weights_is_counted(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/old", {"config.json": b"{}", "pytorch_model.bin": bytes(1_000_000)})
    free = SimpleNamespace(free=1_500_000 + remote.SPARE)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert "needs 2.0 MB" in refused("org/old", KvrunError).what


def test_d5_a_disk_that_becomes_full(hub: Hub, cache: Path, kvrun: Start) -> None:
    folder = pull()
    hub.add("org/m", MODEL | {"model.safetensors": WEIGHTS + b"new"})
    # No file may be larger than 100 KiB: a write fails as it does on a full disk.
    code, _, err = end(kvrun("pull", "org/m", limit="ulimit -f 100"))
    assert code == 1
    assert "the disk is full: model.safetensors needs 205 kB" in err
    assert not list(blobs(cache).glob("*.incomplete"))
    assert local.resolve("org/m") == folder
    assert contents(folder) == MODEL


@pytest.mark.parametrize(
    "name",
    ["../config.json", "/tmp/config.json", "a/../../config.json", "..\\config.json", "C:x.json",
     "a//b.json", "./a.json", "a\nb.json"],
)  # fmt: skip
def test_d9_names_that_lead_elsewhere(hub: Hub, cache: Path, name: str) -> None:
    hub.add("org/bad", MODEL | {name: b"{}"})
    assert "outside its folder" in refused("org/bad", BadCheckpoint).cause
    assert not cache.exists()


def test_d9_names_that_are_one_without_case(hub: Hub, cache: Path) -> None:
    hub.add("org/bad", MODEL | {"Config.json": b"{}"})
    assert "'Config.json'" in refused("org/bad", BadCheckpoint).what
    assert not cache.exists()
    assert contents(pull("org/bad", exclude=["Config.json"])) == MODEL


def test_d9_a_link_in_the_snapshot_is_not_followed(hub: Hub, cache: Path, tmp_path: Path) -> None:
    commit = hub.add("org/m", MODEL | {"sub/a.json": b"{}"})
    snapshot = cache / "models--org--m" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (snapshot / "sub").symlink_to(tmp_path / "elsewhere")
    assert "is a link" in refused("org/m", BadCheckpoint, include=["*"]).what
    assert not list((tmp_path / "elsewhere").iterdir())


def test_d9_a_commit_that_is_a_path(hub: Hub, cache: Path) -> None:
    repo = hub.repos["org/m"]
    repo.commits["../../../escaped"] = MODEL
    repo.branches["main"] = "../../../escaped"
    assert "no commit" in refused("org/m", BadCheckpoint).cause
    assert not cache.exists()


def test_d10_killed_while_converting_the_next_one_starts_clean(
    tmp_path: Path, kvrun: Start
) -> None:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tensors = {f"layer.{n}": torch.full((1000, 100), float(n)) for n in range(50)}
    torch.save(tensors, folder / choose.BIN)
    process = kvrun("pull", str(folder))
    assert "writing pytorch_model.bin" in (process.stderr or [""]).readline()  # type: ignore[union-attr]
    children = psutil.Process(process.pid).children()
    process.kill()
    end(process)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    left = {path.name for path in folder.iterdir()} - {"config.json", choose.BIN}
    assert [name for name in left if not name.startswith(STAGING)] == []
    code, _, _ = end(kvrun("pull", str(folder)))
    assert code == 0
    assert {path.name for path in folder.iterdir()} == {"config.json", choose.BIN, choose.SAFE}


def test_a_limited_process_ends_with_its_parent() -> None:
    code = (
        "import threading; from kvrun.hub.limits import confine, tell\n"
        "confine(1 << 30, 1 << 20); tell(ready=True); threading.Event().wait()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b'{"ready": true}\n'
        assert process.poll() is None
        assert process.stdin is not None
        process.stdin.close()
        try:
            assert process.wait(timeout=20) == 1
        finally:
            process.kill()


def test_what_another_process_is_making_is_left_alone(tmp_path: Path) -> None:
    mine, dead = tmp_path / f"{STAGING}{os.getpid()}-x", tmp_path / f"{STAGING}4194305-x"
    mine.mkdir()
    dead.mkdir()
    _sweep(tmp_path)
    assert mine.exists()
    assert not dead.exists()


def test_the_first_error_stops_the_others(hub: Hub) -> None:
    gate = threading.Event()
    hub.faults += [Fault("model.safetensors", hold=gate), Fault("tokenizer.json", flip=True)]
    try:
        assert "tokenizer.json" in refused("org/m", BadCheckpoint).what
    finally:
        gate.set()


def test_tries_are_counted_from_the_last_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_PAUSE", 0.0)
    got = {"bytes": 0, "calls": 0}

    def attempt() -> Any:
        got["calls"] += 1
        if got["calls"] <= 20:
            got["bytes"] += 1
        raise transfer.Short("again")

    with pytest.raises(transfer.Short):
        transfer.patiently(attempt, threading.Event(), lambda: got["bytes"])
    assert got["calls"] == 20 + transfer.TRIES
