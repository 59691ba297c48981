"""One file of a repository into the cache: resumed where it stopped, checked, put in place.

The requests are huggingface_hub's. It keeps no part of a file whose process died, so the part,
its checksum and its way to its final name are kept here, in the places and under the lock that
huggingface_hub uses itself.
"""

import errno
import hashlib
import logging
import os
import random
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import IO, Any, Protocol, TypeVar

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers, disable_progress_bars

from kvrun import __version__
from kvrun.errors import BadCheckpoint, KvrunError
from kvrun.hub.refusals import TRANSPORT, WORTH_WAITING
from kvrun.runtime.plan import size as shown

TRIES = 6
FIRST_PAUSE = 0.5  # seconds, doubled by each failure
LONGEST_PAUSE = 30.0
# What is served by plain HTTP, which can be resumed; larger files go by way of hf_xet.
LARGEST = constants.MAX_HTTP_DOWNLOAD_SIZE
# What is read at once is lost when the process is killed: little, so that slow lines get on.
constants.DOWNLOAD_CHUNK_SIZE = 1 << 18
constants.HF_HUB_DISABLE_TELEMETRY = True
if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
    disable_progress_bars()
if not os.environ.get("HF_HUB_VERBOSITY"):  # retries would be told between the bars
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)

Result = TypeVar("Result")
ETAG = re.compile(r"[A-Za-z0-9_-]{1,128}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SHA1 = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class File:
    """A file of a repository: its size in bytes, and the checksums its listing names."""

    name: str
    size: int
    git_oid: str  # of the file, or of the pointer to it where there is a sha256
    sha256: str | None


@dataclass(frozen=True)
class Place:
    """A commit of a repository, where it is asked for, and the folder that keeps it."""

    repo: str
    commit: str
    endpoint: str
    token: str | None
    root: Path  # models--ORG--NAME

    @property
    def snapshot(self) -> Path:
        return self.root / "snapshots" / self.commit

    def entry(self, name: str) -> Path:
        """Where a file shall appear. Raises BadCheckpoint when a link leads out of the folder."""
        path = self.snapshot / name
        if any(folder.is_symlink() for folder in path.parents if self.snapshot in folder.parents):
            raise BadCheckpoint(f"{path.parent} is a link.", hint="remove it")
        return path

    def lock(self, etag: str) -> Path:
        return self.root.parent / ".locks" / self.root.name / f"{etag}.lock"


class Watch(Protocol):
    """Who shows how far a pull has got. Called from several threads."""

    def begin(self, files: list[File]) -> None:
        """These files will be fetched."""

    def add(self, name: str, count: int) -> None:
        """So many more bytes of a file are here; negative when some have to come again."""

    def have(self, name: str, count: int) -> None:
        """So many bytes of a file were here already."""

    def end(self, name: str) -> None:
        """A file is complete."""

    def say(self, text: str) -> None:
        """A remark."""


class Stopped(Exception):
    """Another file failed, or the user has had enough."""


def fetch(place: Place, file: File, watch: Watch, stop: Event) -> Path:
    """The blob of a file, which may have been there. Several processes may ask for it at once.

    Raises BadCheckpoint for bytes that are not what was promised, KvrunError for a full disk,
    and what the network raises.
    """
    if file.size > LARGEST:
        return _fetch_large(place, file, watch)
    url = hf_hub_url(place.repo, file.name, revision=place.commit, endpoint=place.endpoint)
    said = patiently(lambda: get_hf_file_metadata(url, token=_token(place)), stop)
    etag = said.etag or ""
    if not ETAG.fullmatch(etag):
        raise BadCheckpoint(f"the server names {file.name} {etag[:80]!r}.",
                            cause="that is no ETag")  # fmt: skip
    if said.size is not None and said.size != file.size:
        raise BadCheckpoint(
            f"{file.name} has {file.size} bytes by its listing, {said.size} by its header.",
            hint="try again later; if HF_ENDPOINT is set, the mirror is at fault",
        )
    blob = place.root / "blobs" / etag
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock = place.lock(etag)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not (blob.is_file() and blob.stat().st_size == file.size):
            _download(url, place, file, etag, blob, watch, stop)
        else:
            watch.have(file.name, file.size)
    return blob


def link(blob: Path, entry: Path) -> None:
    """Let a snapshot's entry point to a blob, at once or not at all."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    made = entry.with_name(f".{entry.name}.{os.getpid()}.new")
    made.unlink(missing_ok=True)
    try:
        made.symlink_to(os.path.relpath(blob, entry.parent))
    except OSError:  # a file system without links
        os.link(blob, made)
    os.replace(made, entry)


def headers(place: Place) -> dict[str, str]:
    """Of every request; without compression, so that sizes are those of files."""
    made = build_hf_headers(token=_token(place), library_name="kvrun", library_version=__version__)
    return {**made, "Accept-Encoding": "identity"}


def part_size(place: Place, file: File) -> int:
    """Bytes of a file that an earlier pull has left, by the name it most likely has."""
    part = place.root / "blobs" / f"{file.sha256 or file.git_oid}.incomplete"
    return part.stat().st_size if part.is_file() else 0


def _token(place: Place) -> str | bool | None:
    return place.token  # None: huggingface_hub looks for the one that `hf auth login` has stored


def _fetch_large(place: Place, file: File, watch: Watch) -> Path:
    watch.say(f"{file.name} has {shown(file.size)}: fetched in one go, by hf_xet")
    path = hf_hub_download(
        place.repo, file.name, revision=place.commit, cache_dir=place.root.parent,
        endpoint=place.endpoint, token=_token(place),
    )  # fmt: skip
    watch.add(file.name, file.size)
    return Path(path).resolve()


def _download(
    url: str, place: Place, file: File, etag: str, blob: Path, watch: Watch, stop: Event
) -> None:
    part = blob.with_name(f"{etag}.incomplete")
    promised = etag if SHA256.fullmatch(etag) else file.sha256
    resumed = part.is_file() and part.stat().st_size > 0
    try:
        while True:
            sink = Sink(part, file, watch, stop)
            try:
                _attempts(url, place, file, sink, stop)
                wrong = sink.wrong(promised)
            finally:
                sink.close()
            if wrong is None:
                break
            part.unlink()
            watch.add(file.name, -sink.count)
            if not resumed:
                raise BadCheckpoint(
                    f"{file.name} has arrived with other bytes than it should.", cause=wrong,
                    hint="pull again; if it happens again, the server or the line alters files",
                )  # fmt: skip
            resumed = False  # what an earlier pull left may have been at fault: once more, afresh
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        part.unlink(missing_ok=True)
        raise KvrunError(
            f"the disk is full: {file.name} needs {shown(file.size)}.",
            cause=f"{error.strerror}: {part.parent}",
            hint="kvrun rm MODEL frees space; HF_HUB_CACHE names another folder",
        ) from error
    os.replace(part, blob)


def _attempts(url: str, place: Place, file: File, sink: "Sink", stop: Event) -> None:
    try:
        patiently(lambda: _get(url, place, file, sink), stop, lambda: sink.count)
    except Short as error:
        raise BadCheckpoint(
            f"{file.name} does not come to its end.", cause=str(error),
            hint="pull again; if it happens again, the server has another file than it lists",
        ) from error  # fmt: skip


def _get(url: str, place: Place, file: File, sink: "Sink") -> None:
    """One attempt at what is missing of a file."""
    if sink.count > file.size:
        sink.restart()
    if sink.count == file.size:
        return
    try:
        http_get(
            url, sink, resume_size=sink.count, headers=headers(place),  # type: ignore[arg-type]
            expected_size=file.size, displayed_filename=file.name,
        )  # fmt: skip
    except HfHubHTTPError as error:
        if error.response.status_code != 416:
            raise
        sink.restart()
        raise Short("the server does not go on where it stopped") from error
    except OSError as error:
        if isinstance(error, TRANSPORT) or error.errno is not None:
            raise
        raise Short(f"{sink.count} bytes have come of {file.size}") from error


class Short(Exception):
    """Fewer bytes than promised, without an error."""


BUSY: tuple[type[Exception], ...] = (Short, *TRANSPORT)


class Sink:
    """The part of a file that is here, as http_get writes to it: counted, hashed, shown."""

    def __init__(self, path: Path, file: File, watch: Watch, stop: Event) -> None:
        self._file: IO[bytes] = path.open("a+b", buffering=0)
        self._about = file
        self._watch = watch
        self._stop = stop
        self.count = 0
        self._hashes = self._fresh()
        self._file.seek(0)
        while piece := self._file.read(1 << 20):
            self._take(piece)
        watch.have(file.name, self.count)

    def write(self, data: bytes) -> int:
        """Append; raises Stopped when nobody wants it any more."""
        if self._stop.is_set():
            raise Stopped
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])
        self._take(data)
        self._watch.add(self._about.name, len(data))
        return done

    def tell(self) -> int:
        """Bytes so far."""
        return self.count

    def seek(self, position: int, whence: int = 0) -> int:
        """Only to the start: what follows is `truncate`."""
        return self._file.seek(position, whence)

    def truncate(self, size: int | None = None) -> int:
        """The server sends everything again."""
        self.restart()
        return 0

    def restart(self) -> None:
        """Forget what is here."""
        self._file.seek(0)
        self._file.truncate(0)
        self._watch.add(self._about.name, -self.count)
        self.count, self._hashes = 0, self._fresh()

    def wrong(self, sha256: str | None) -> str | None:
        """Why the file is not what was promised, or None. It is on the disk afterwards."""
        os.fsync(self._file.fileno())
        sha, git = (one.hexdigest() for one in self._hashes)
        if self.count != self._about.size:
            return f"it has {self.count} bytes instead of {self._about.size}"
        if sha256:
            return None if sha == sha256 else f"its sha256 is {sha} instead of {sha256}"
        oid = self._about.git_oid
        return None if git == oid or not SHA1.fullmatch(oid) else f"its git id is not {oid}"

    def close(self) -> None:
        """Let go; the part stays."""
        with suppress(OSError):
            self._file.close()

    def _take(self, data: bytes) -> None:
        for one in self._hashes:
            one.update(data)
        self.count += len(data)

    def _fresh(self) -> tuple[Any, ...]:
        # Git hashes a file with its size before it.
        git = hashlib.sha1(f"blob {self._about.size}\0".encode(), usedforsecurity=False)
        return hashlib.sha256(), git


def patiently(
    attempt: Callable[[], Result],
    stop: Event,
    got: Callable[[], int] = lambda: 0,
    tries: int = TRIES,
) -> Result:
    """The result of an attempt, repeated while the network or the server is only busy.

    Attempts that `got` further do not count.
    """
    again, last = 0, got()
    while True:
        try:
            return attempt()
        except BUSY as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            again, last = (0 if got() > last else again + 1), got()
            if again >= tries or (status is not None and status not in WORTH_WAITING):
                raise
            pause = _pause(error, again)
        if stop.wait(pause):
            raise Stopped


def _pause(error: Exception, again: int) -> float:
    asked = str(getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", ""))
    if asked.isdigit():
        return min(float(asked), LONGEST_PAUSE)
    return min(FIRST_PAUSE * 2.0 ** max(again - 1, 0), LONGEST_PAUSE) * random.uniform(0.5, 1.0)
