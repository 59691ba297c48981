"""A model's name -> the folder it lies in on this machine; nothing is asked of a network."""

import difflib
import json
import os
import re
from pathlib import Path

from kvrun.errors import BadCheckpoint, NotFound, Unsupported

PACKAGE = Path(__file__).parents[1]
BUILTIN = {"tiny": PACKAGE / "tiny"}

PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
NAME = re.compile(rf"(?P<repo>{PART}(?:/{PART})?)(?:@(?P<revision>{PART}(?:/{PART})*))?")
COMMIT = re.compile(r"[0-9a-f]{7,64}")
SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
NEAR = 0.78  # of difflib; below, words that are no names begin to resemble some


def resolve(name: str) -> Path:
    """the folder of a model: a path, a built-in name, or ORG/NAME[@REVISION] in the HF cache.

    A built-in name wins over a folder called the same; ./NAME is always the folder. Raises
    NotFound with a way to get it, BadCheckpoint for a download that is not complete and
    Unsupported for weights that are not stored as safetensors, such as GGUF.
    """
    if name in BUILTIN:
        return _with_config(BUILTIN[name], f"The built-in model '{name}'", "install kvrun again")
    path = _existing(name)
    if path is not None and path.is_dir():
        hint = "a model folder holds config.json, *.safetensors and tokenizer.json"
        return _with_config(path, f"the folder {name}", hint)
    if path is not None:
        refuse_gguf(path)
        raise NotFound(f"{name} is a file.", hint=f"name the folder: {path.parent}")
    parts = _parts(name)
    if parts is None:
        shown = name if len(name) <= 80 else name[:77] + "..."
        what = f"there is no folder {shown}." if _is_path(name) else f"'{shown}' is no model name."
        hint = "a model is a folder, a name like ORG/NAME, or " + " or ".join(BUILTIN)
        raise NotFound(what, hint=hint)
    return _cached(name, *parts)


def is_model_name(name: str) -> bool:
    """Whether `name` can only mean a model: a folder, a built-in or cached one, or ORG/NAME."""
    if name in BUILTIN:
        return True
    parts = _parts(name)
    if parts is not None and ("/" in parts[0] or _cache_folder(parts[0]).is_dir()):
        return True
    path = _existing(name)
    return path is not None and path.is_dir()


def adapters_of(model: str) -> dict[str, str]:
    """The adapters inside the package that belong to a built-in model: name -> folder."""
    if model not in BUILTIN:
        return {}
    folders = sorted((BUILTIN[model] / "adapters").glob("*/adapter_config.json"))
    return {config.parent.name: str(config.parent) for config in folders}


def resolve_adapter(model: str, name: str) -> Path:
    """The folder of a LoRA adapter: built in with `model`, a path, or ORG/NAME in the HF cache.

    "dummy:RANK:SEED" is no folder and stays as it is: the engine makes random values for it.
    Raises NotFound when there is none, or none with an adapter_config.json.
    """
    if name.startswith("dummy:"):
        return Path(name)
    known = adapters_of(model)
    if name in known:
        return Path(known[name])
    path = _existing(name) or cached_adapter(name)
    if path is None:
        offered = f"built in for '{model}': {', '.join(known)}; or " if known else ""
        raise NotFound(
            f"there is no adapter '{name[:80]}'.",
            hint=f"{offered}name the folder that holds adapter_config.json",
        )
    if not (path / "adapter_config.json").is_file():
        raise NotFound(
            f"{path} holds no LoRA adapter.",
            cause="adapter_config.json is not there",
            hint="an adapter's folder holds adapter_config.json and adapter_model.safetensors",
        )
    return path


def is_pullable(name: str) -> bool:
    """Whether `name` can be asked of the Hub: ORG/NAME[@REVISION] that is nothing on this disk."""
    parts = _parts(name)
    return parts is not None and "/" in parts[0] and _existing(name) is None


def cached_adapter(name: str) -> Path | None:
    """The folder of ORG/NAME[@REVISION] in the HF cache, if it is there."""
    parts = _parts(name)
    return _snapshot(_cache_folder(parts[0]), parts[1]) if parts and "/" in parts[0] else None


def builtin_names() -> list[str]:
    """The models inside the package."""
    return list(BUILTIN)


def cached_names() -> list[str]:
    """ORG/NAME of the models in the HF cache, sorted, complete or not."""
    try:
        folders = [entry.name for entry in os.scandir(cache_root()) if entry.is_dir()]
    except OSError:
        return []
    names = [f.removeprefix("models--").replace("--", "/") for f in folders if "models--" in f[:8]]
    return sorted(name for name in names if _parts(name))


def near(name: str) -> list[str]:
    """Known names that resemble `name`, best first; with or without the organisation."""
    if not name or len(name.split()) > 1:
        return []
    wanted = name.partition("@")[0].casefold()
    by_spelling: dict[str, str] = {}
    for known in [*cached_names(), *BUILTIN]:
        by_spelling[known.casefold()] = known
        by_spelling.setdefault(known.casefold().rpartition("/")[2], known)
    found = difflib.get_close_matches(wanted, by_spelling, 3, NEAR)
    found += difflib.get_close_matches(wanted.rpartition("/")[2], by_spelling, 3, NEAR)
    return list(dict.fromkeys(by_spelling[spelling] for spelling in found))


def cache_root() -> Path:
    """Where models downloaded with Hugging Face's tools lie, by their environment variables."""
    environment = os.environ
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environment.get(variable):
            return Path(environment[variable]).expanduser()
    if environment.get("HF_HOME"):
        return Path(environment["HF_HOME"]).expanduser() / "hub"
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "huggingface" / "hub"


def _parts(name: str) -> tuple[str, str | None] | None:
    """Repository and revision of a well-formed name."""
    match = NAME.fullmatch(name)
    if match is None or ".." in name or "--" in match["repo"] or len(name) > 200:
        return None
    return match["repo"], match["revision"]


def _existing(name: str) -> Path | None:
    """The absolute path of something that exists; any text may be asked for."""
    if not name:
        return None
    try:
        path = Path(name).expanduser().absolute()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, an unknown ~user
        return None


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~", "\\")) or os.sep in name or name[1:3] == ":\\"


def _with_config(folder: Path, what: str, hint: str) -> Path:
    if not (folder / "config.json").is_file():
        refuse_gguf(folder)
        raise NotFound(f"{what} has no config.json.", cause=str(folder), hint=hint)
    return folder


def refuse_gguf(path: Path) -> None:
    """Raises Unsupported where what is no model is a file of GGUF, or a folder that has one."""
    found = sorted(path.glob("*.gguf")) if path.is_dir() else [path]
    if found and found[0].suffix == ".gguf":
        raise Unsupported(
            f"{found[0].name} is GGUF, which kvrun does not read.",
            hint="pull the repository that holds the model as safetensors: kvrun pull ORG/NAME",
        )


def _cache_folder(repo: str) -> Path:
    return cache_root() / ("models--" + repo.replace("/", "--"))


def _cached(name: str, repo: str, revision: str | None) -> Path:
    folder = _cache_folder(repo)
    download = f"kvrun pull {repo}" + (f"@{revision}" if revision else "")
    if not folder.is_dir():
        alike = near(name)
        hint = f"did you mean '{alike[0]}'?" if alike else None
        if "/" in repo:
            what = f"'{repo}' is not on this machine."
            hint = f"{hint} If not: {download}" if hint else download
            raise NotFound(what, cause=f"it is not in {cache_root()}", hint=hint)
        known = ", ".join([*BUILTIN, "ORG/NAME", "a folder"])
        raise NotFound(f"there is no model '{name}'.", hint=hint or f"a model is one of: {known}")
    snapshot = _snapshot(folder, revision)
    if snapshot is None:
        wanted = f"revision '{revision}'" if revision else "a complete download"
        cause = f"{folder} does not hold {wanted}"
        raise NotFound(f"'{name}' is not on this machine.", cause=cause, hint=download)
    adapter = (snapshot / "adapter_config.json").is_file()
    if adapter and not (snapshot / "config.json").is_file():
        raise Unsupported(
            f"'{name}' is an adapter, not a model.", hint=f"kvrun chat MODEL --adapter NAME={repo}"
        )
    missing = _missing(snapshot)
    if missing:
        raise BadCheckpoint(
            f"'{name}' was not downloaded completely.",
            cause=f"{snapshot} lacks {missing}",
            hint=download,
        )
    return snapshot


def _snapshot(folder: Path, revision: str | None) -> Path | None:
    """the folder of a branch, tag or commit; without one, of main or else of the only commit."""
    snapshots = folder / "snapshots"
    reference = folder / "refs" / (revision or "main")
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8", errors="replace").strip()
        if COMMIT.fullmatch(commit) and (snapshots / commit).is_dir():
            return snapshots / commit
    commits = [entry for entry in snapshots.glob("*") if COMMIT.fullmatch(entry.name)]
    if revision is not None:
        begins = COMMIT.fullmatch(revision)
        commits = [entry for entry in commits if begins and entry.name.startswith(revision)]
    return commits[0] if len(commits) == 1 and commits[0].is_dir() else None


def _missing(snapshot: Path) -> str | None:
    """The first file without which the model cannot be read, or None when all are there.

    Entries are links to blobs, which are there only once a file is complete.
    """
    if not (snapshot / "config.json").is_file():
        return "config.json"
    index = snapshot / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadCheckpoint(f"{index} cannot be read.", cause=repr(error)) from error
        return next((shard for shard in shards if not (snapshot / shard).is_file()), None)
    there = [path.name for path in snapshot.glob("*.safetensors") if path.is_file()]
    if any(not SHARD.fullmatch(name) for name in there):
        return None
    if there:
        return index.name
    if any(snapshot.glob("*.bin")) or any(snapshot.glob("*.gguf")):
        raise Unsupported(
            "the model's weights are not stored as safetensors.",
            cause=f"{snapshot} holds .bin or .gguf files only",
            hint="kvrun pull converts .bin files; of .gguf look for the model it was made from",
        )
    return "its weights (*.safetensors)"
