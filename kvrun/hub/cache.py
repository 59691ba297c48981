"""What lies in the Hugging Face cache: list it, remove from it; nothing is asked of a network."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kvrun.errors import InvalidRequest, KvrunError, NotFound
from kvrun.hub.local import BUILTIN, COMMIT, cache_root, cached_names, near, resolve

LEFT = "*.incomplete"  # parts of files, in blobs


@dataclass(frozen=True)
class Entry:
    """One revision of a model or adapter: where it is, bytes it takes, what it lacks (or "")."""

    name: str  # ORG/NAME, with @REVISION where there are several
    repo: str
    kind: str  # "model", "adapter", or "part" of a download
    folder: Path
    commit: str
    revisions: tuple[str, ...]
    bytes: int
    modified: float  # seconds since 1970
    lacks: str


def entries() -> list[Entry]:
    """Every model and adapter of the cache, and the built-in ones, by name."""
    found = [_builtin(name, folder) for name, folder in BUILTIN.items()]
    for repo in cached_names():
        found += _repository(repo)
    return sorted(found, key=lambda entry: entry.name.casefold())


def base_of(folder: Path) -> str | None:
    """The model that an adapter's folder says it was made for."""
    try:
        said = json.loads((folder / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        return None
    base = said.get("base_model_name_or_path") if isinstance(said, dict) else None
    return base if isinstance(base, str) and base else None


def check_removable(name: str) -> None:
    """Raise NotFound for what is not in the cache, InvalidRequest for what is not kvrun's."""
    repo, _, revision = name.partition("@")
    if name in BUILTIN:
        raise InvalidRequest(f"'{name}' is part of kvrun.", hint="pip uninstall kvrun")
    if repo in cached_names():
        if revision and _commit(_folder(repo), revision) is None:
            known = ", ".join(entry.commit[:8] for entry in _repository(repo)) or "none"
            what = f"'{repo}' has no revision '{revision}' here."
            raise NotFound(what, hint=f"there are: {known}")
        return
    try:
        own = Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        own = False
    if own:
        raise InvalidRequest(
            f"{name} is a folder of your own.", hint="only models of the Hugging Face cache go"
        )
    alike = near(name)
    hint = f"did you mean '{alike[0]}'?" if alike else "kvrun ls lists what is there"
    raise NotFound(f"'{name[:80]}' is not in {cache_root()}.", hint=hint)


def remove(name: str) -> int:
    """Remove ORG/NAME, or one revision of it and what only that needs; the bytes freed.

    Raises what `check_removable` raises, and KvrunError when the disk refuses.
    """
    check_removable(name)
    repo, _, revision = name.partition("@")
    folder = _folder(repo)
    before = _used(folder)
    gone = _commit(folder, revision) if revision else None
    if gone is None or len(_snapshots(folder)) == 1:
        _vanish(folder)
        shutil.rmtree(folder.parent / ".locks" / folder.name, ignore_errors=True)
        return before
    for reference in _references(folder):
        if reference.read_text(encoding="utf-8", errors="replace").strip() == gone.name:
            reference.unlink()
    _vanish(gone)
    (folder / "trees" / f"{gone.name}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / ".no_exist" / gone.name, ignore_errors=True)
    wanted = {link.resolve() for kept in _snapshots(folder) for link in _files(kept)}
    for blob in _files(folder / "blobs"):
        if blob.resolve() not in wanted and not blob.match(LEFT):
            blob.unlink()
    return before - _used(folder)


def _folder(repo: str) -> Path:
    return cache_root() / ("models--" + repo.replace("/", "--"))


def _builtin(name: str, folder: Path) -> Entry:
    size = sum(path.stat().st_size for path in _files(folder))
    return Entry(name, name, "model", folder, "", (), size, folder.stat().st_mtime, "")


def _repository(repo: str) -> list[Entry]:
    folder = _folder(repo)
    named: dict[str, list[str]] = {}
    for reference in _references(folder):
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
        named.setdefault(commit, []).append(str(reference.relative_to(folder / "refs")))
    snapshots = _snapshots(folder)
    if not snapshots:
        return [Entry(repo, repo, "part", folder, "", (), _used(folder),
                      folder.stat().st_mtime, "everything")]  # fmt: skip
    found = []
    for snapshot in snapshots:
        revisions = tuple(sorted(named.get(snapshot.name, ())))
        alone = len(snapshots) == 1 and (not revisions or "main" in revisions)
        said = revisions[0] if revisions else snapshot.name[:8]
        name = repo if alone or "main" in revisions else f"{repo}@{said}"
        files = [path for path in _files(snapshot) if path.exists()]
        size = sum(path.stat().st_size for path in files)
        if len(snapshots) == 1:
            size = _used(folder)
        kind, lacks = _state(snapshot, repo)
        modified = max((path.stat().st_mtime for path in files), default=snapshot.stat().st_mtime)
        found.append(
            Entry(name, repo, kind, snapshot, snapshot.name, revisions, size, modified, lacks)
        )
    return found


def _state(snapshot: Path, repo: str) -> tuple[str, str]:
    """What a snapshot is, and what it lacks."""
    if (snapshot / "adapter_config.json").is_file() and not (snapshot / "config.json").is_file():
        weights = (snapshot / "adapter_model.safetensors").is_file()
        return "adapter", "" if weights else "adapter_model.safetensors"
    try:
        resolve(f"{repo}@{snapshot.name}")  # a folder of your own may be called ORG/NAME
    except KvrunError as error:
        return "part", error.cause.rpartition(" lacks ")[2] or error.what
    return "model", ""


def _snapshots(folder: Path) -> list[Path]:
    found = (folder / "snapshots").glob("*")
    return sorted(path for path in found if COMMIT.fullmatch(path.name) and path.is_dir())


def _commit(folder: Path, revision: str) -> Path | None:
    reference = folder / "refs" / revision
    wanted = reference.read_text(errors="replace").strip() if reference.is_file() else revision
    found = [path for path in _snapshots(folder) if path.name.startswith(wanted)]
    return found[0] if len(found) == 1 and COMMIT.fullmatch(wanted) else None


def _references(folder: Path) -> list[Path]:
    return [path for path in _files(folder / "refs") if not path.name.startswith(".")]


def _files(folder: Path) -> Iterator[Path]:
    """Files and links below a folder, also those that lead nowhere."""
    for at, _, names in os.walk(folder):
        for name in names:
            yield Path(at, name)


def _used(folder: Path) -> int:
    """Bytes on the disk; a link costs nothing."""
    total = 0
    for path in _files(folder):
        with suppress(OSError):
            total += path.lstat().st_size if not path.is_symlink() else 0
    return total


def _vanish(folder: Path) -> None:
    """Remove a folder. It is away at once, so that nobody finds half of it."""
    away = folder.with_name(f".{uuid.uuid4().hex}.removed")
    try:
        folder.rename(away)
        shutil.rmtree(away)
    except OSError as error:
        raise KvrunError(f"{folder} cannot be removed.", cause=error.strerror or "") from error
