"""A repository of the Hub -> a folder of the shared cache; huggingface_hub speaks to the server.

A snapshot's config.json, and the branch that names the snapshot, come last: a pull that was
interrupted leaves nothing that looks whole, and what was there before still serves.
"""

import json
import os
import queue
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import WeakFileLock

from kvrun import __version__
from kvrun.errors import BadCheckpoint, InvalidRequest, KvrunError, Unreachable
from kvrun.hub import choose, complete, transfer
from kvrun.hub.local import cache_root, is_pullable
from kvrun.hub.refusals import TRANSPORT, Asked, explain, offline
from kvrun.hub.transfer import File, Place, Watch
from kvrun.runtime.plan import size as shown

ENDPOINT = "https://huggingface.co"
AT_ONCE = 8
SPARE = 64 << 20  # bytes left on the disk for everybody else
NETWORK: tuple[type[Exception], ...] = (*TRANSPORT, OSError)
COMMIT = re.compile(r"[0-9a-f]{40,64}")


@dataclass(frozen=True)
class Offer:
    """What a pull would take: files, and those of them that must be fetched still."""

    place: Place
    revision: str
    files: tuple[File, ...]
    weights: choose.Weights | None
    missing: tuple[File, ...]
    here: int  # bytes of the missing files that an earlier pull has left

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def to_fetch(self) -> int:
        """Bytes that will be fetched."""
        return sum(file.size for file in self.missing) - self.here

    @property
    def to_convert(self) -> int:
        """Bytes of pickled weights that will be written again as safetensors."""
        pickled = self.weights.files if self.weights and self.weights.pickled else ()
        return sum(file.size for file in self.files if file.name in pickled)


def look(name: str, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Offer:
    """What `pull` would do for ORG/NAME[@REVISION]; nothing of weight is fetched.

    Raises NotFound for what is not there or gated, Unsupported for weights of other kinds,
    Unreachable without a network, BadCheckpoint for a repository that must not be trusted.
    """
    if not is_pullable(name):
        raise InvalidRequest(f"'{name[:80]}' is no ORG/NAME[@REVISION].")
    repo, _, said = name.partition("@")
    revision = said or None
    asked = Asked(repo, revision, os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT)
    if offline():
        hint = "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to pull"
        raise Unreachable(f"'{name}' cannot be pulled: the network is forbidden.", hint=hint)
    try:
        return _look(asked, list(include), list(exclude))
    except NETWORK as error:
        raise _explained(error, asked) from error


def pull(offer: Offer, watch: Watch) -> Path:
    """Fetch what is missing, several files at once, and complete it; the snapshot's folder.

    Raises what `look` raises, BadCheckpoint for bytes that are not what was promised, and
    KvrunError when the disk has no room. Interrupted, it goes on from there the next time.
    """
    place = offer.place
    check_room(offer)
    asked = Asked(place.repo, offer.revision, place.endpoint)
    place.snapshot.mkdir(parents=True, exist_ok=True)
    place.lock("").parent.mkdir(parents=True, exist_ok=True)
    blobs: dict[str, Path] = {}
    watch.begin(list(offer.missing))

    def one(file: File, stop: Event) -> None:
        blobs[file.name] = transfer.fetch(place, file, watch, stop)
        if file.name not in choose.MANIFESTS:
            transfer.link(blobs[file.name], place.entry(file.name))
        watch.end(file.name)

    try:
        _at_once(sorted(offer.missing, key=lambda file: -file.size), one)
    except NETWORK as error:
        raise _explained(error, asked) from error
    with WeakFileLock(place.lock(f"kvrun-{place.commit}")):
        _finish(offer, blobs, watch)
    return place.snapshot


def _finish(offer: Offer, blobs: dict[str, Path], watch: Watch) -> None:
    """Complete a snapshot, then let it be found."""
    place = offer.place
    manifests = {n: blobs[n] for n in choose.MANIFESTS if n in blobs}
    complete.finish(place.snapshot, manifests, watch.say)
    if offer.weights and offer.weights.pickled and manifests:
        _drop_pickles(place, offer.weights)
    for name, blob in manifests.items():
        transfer.link(blob, place.entry(name))
    _refer(place, offer.revision)


def _explained(error: Exception, asked: Asked) -> Exception:
    """What the network or the Hub says in kvrun's words; errors of this machine stay."""
    theirs = isinstance(error, TRANSPORT) or type(error).__module__.startswith("huggingface_hub")
    return explain(error, asked) if theirs else error


def config(offer: Offer) -> dict[str, Any]:
    """The values of a repository's config.json, which is fetched for it; {} without one."""
    file = next((file for file in offer.files if file.name == choose.CONFIG), None)
    if file is None:
        return {}
    entry = offer.place.entry(file.name)
    if not entry.is_file():
        asked = Asked(offer.place.repo, offer.revision, offer.place.endpoint)
        try:
            entry = transfer.fetch(offer.place, file, Nobody(), Event())
        except NETWORK as error:
            raise _explained(error, asked) from error
    try:
        values = json.loads(entry.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"config.json of '{offer.place.repo}' is not JSON.") from error
    return values if isinstance(values, dict) else {}


def check_room(offer: Offer) -> None:
    """Raise KvrunError when the disk cannot take what is missing."""
    need = offer.to_fetch + offer.to_convert
    folder = offer.place.root
    while not folder.is_dir():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if need and need + SPARE > free:
        raise KvrunError(
            f"'{offer.place.repo}' needs {shown(need)} of disk, {shown(free)} are free.",
            cause=f"{folder} is on a disk that is nearly full",
            hint="kvrun rm MODEL frees space; HF_HUB_CACHE names another folder",
        )


def _look(asked: Asked, include: list[str], exclude: list[str]) -> Offer:
    repo, revision, endpoint = asked
    token = get_token()
    api = HfApi(endpoint=endpoint, token=token, library_name="kvrun", library_version=__version__)
    stop = Event()
    info = transfer.patiently(lambda: _first(api, repo, revision), stop, tries=2)
    commit = info or ""
    if not COMMIT.fullmatch(commit):
        raise BadCheckpoint(f"{endpoint} says that '{repo}' is at {commit[:80]!r}.",
                            cause="that is no commit")  # fmt: skip
    listed = transfer.patiently(
        lambda: list(api.list_repo_tree(repo, recursive=True, revision=commit)), stop
    )
    files = {
        f.path: File(f.path, f.lfs.size if f.lfs else f.size, f.blob_id, _sha256(f))
        for f in listed
        if isinstance(f, RepoFile)
    }
    choose.check_names(files)
    root = cache_root().expanduser().absolute() / ("models--" + repo.replace("/", "--"))
    place = Place(repo, commit, endpoint, token, root)
    weights = _weights(place, files, bool(include))
    chosen = choose.select(list(files), weights, include, exclude)
    choose.check_case(chosen)
    taken = tuple(files[name] for name in chosen)
    done = weights is not None and weights.pickled and complete.converted(place.snapshot)
    if done and weights:  # what it was made from is not needed again
        taken = tuple(f for f in taken if f.name not in (*weights.files, weights.index))
        weights = None
    missing = tuple(file for file in taken if not _is_here(place, file))
    here = sum(min(transfer.part_size(place, file), file.size) for file in missing)
    return Offer(place, revision or "main", taken, weights, missing, here)


def _first(api: HfApi, repo: str, revision: str | None) -> str | None:
    return api.model_info(repo, revision=revision, timeout=10).sha


def _sha256(file: RepoFile) -> str | None:
    return file.lfs.sha256 if file.lfs and transfer.SHA256.fullmatch(file.lfs.sha256) else None


def _weights(place: Place, files: dict[str, File], some: bool) -> choose.Weights | None:
    """Which files are the weights. Where only some files are wanted, there need be none."""
    index = choose.find_index(files)
    content = None
    if index is not None:
        stop = Event()
        blob = place.entry(index)
        if not blob.is_file():
            blob = transfer.fetch(place, files[index], Nobody(), stop)
        content = blob.read_bytes()
    try:
        return choose.find_weights(place.repo, files, content)
    except KvrunError:
        if some:
            return None
        raise


def _is_here(place: Place, file: File) -> bool:
    entry = place.entry(file.name)
    return entry.is_file() and entry.stat().st_size == file.size


def _at_once(files: Sequence[File], work: Callable[[File, Event], None]) -> None:
    """Do `work` for every file in a few threads; the first error stops the others and is raised.

    The threads are daemons: Ctrl+C does not wait for a server that is silent.
    """
    todo: queue.SimpleQueue[File] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    stop = Event()
    for file in files:
        todo.put(file)

    def run() -> None:
        with suppress(queue.Empty):
            while not stop.is_set():
                file = todo.get_nowait()
                try:
                    work(file, stop)
                    done.put(None)
                except BaseException as error:
                    done.put(error)

    threads = [Thread(target=run, daemon=True) for _ in range(min(AT_ONCE, len(files)))]
    for thread in threads:
        thread.start()
    failed: BaseException | None = None
    try:
        for _ in files:
            failed = done.get()
            if failed is not None:
                break
    finally:
        stop.set()
    if failed is not None:
        for thread in threads:
            thread.join(timeout=0.1)
        raise failed


def _drop_pickles(place: Place, weights: choose.Weights) -> None:
    """Remove the pickles, now that they are safetensors, and their blobs if nothing else has them.

    Only where kvrun has put them: config.json, which it places last, was not there before.
    """
    for name in (*weights.files, weights.index or ""):
        entry = place.entry(name)
        if not name or not entry.exists():
            continue
        blob = entry.resolve()
        entry.unlink()
        others = (place.root / "snapshots").glob(f"*/{name}")
        if blob.parent == (place.root / "blobs").resolve() and all(
            other.resolve() != blob for other in others
        ):
            blob.unlink()


def _refer(place: Place, revision: str) -> None:
    """Let a branch or tag name the snapshot, at once."""
    if place.commit.startswith(revision):
        return
    path = place.root / "refs" / revision
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{os.getpid()}.new")
    made.write_text(place.commit, encoding="utf-8")
    os.replace(made, path)


class Nobody:
    """Nobody watches."""

    def begin(self, files: list[File]) -> None:
        """Nothing."""

    def add(self, name: str, count: int) -> None:
        """Nothing."""

    def have(self, name: str, count: int) -> None:
        """Nothing."""

    def end(self, name: str) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""
