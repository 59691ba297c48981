"""A folder as it was published -> one kvrun can read: safetensors, and a tokenizer.json.

Both are made by processes of their own, in a folder beside that is moved into place when all of
it is there; what was there before is never changed.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvrun.errors import BadCheckpoint, KvrunError, MissingExtra, NotFound
from kvrun.hub import choose
from kvrun.hub.local import PACKAGE, refuse_gguf

STAGING = ".kvrun-"
TOKENIZERS = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
PACKAGES = "sentencepiece protobuf tiktoken"
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
Say = Callable[[str], None]


def complete(folder: Path, say: Say) -> list[str]:
    """Make what a local folder lacks; the names of the files that were made.

    Raises what `lacks` and `finish` raise.
    """
    lacks(folder)
    return finish(folder, {}, say)


def lacks(folder: Path) -> list[str]:
    """What `complete` would make in a local folder, in words. Raises NotFound without a model, and
    Unsupported for one of GGUF."""
    if not any((folder / name).is_file() for name in choose.MANIFESTS):
        refuse_gguf(folder)
        hint = "a model folder holds config.json, an adapter adapter_config.json"
        raise NotFound(f"{folder} holds no model.", hint=hint)
    if not converted(folder) and not _pickles(folder):
        raise NotFound(
            f"{folder} holds no weights.",
            cause=f"neither {choose.SAFE} nor {choose.BIN} is there",
            hint="kvrun pull ORG/NAME fetches a model from the Hub",
        )
    names = {path.name for path in folder.iterdir() if path.is_file()}
    found = [] if converted(folder) else ["safetensors of the .bin files"]
    return found + (["tokenizer.json"] if _no_tokenizer(names) else [])


def finish(folder: Path, manifests: Mapping[str, Path], say: Say) -> list[str]:
    """Make what is missing of `folder`, of which the `manifests` lie elsewhere still.

    Raises BadCheckpoint for weights that are damaged or hold more than tensors, KvrunError when
    memory or disk do not suffice, and MissingExtra when a tokenizer needs a package.
    """
    made = []
    names = {path.name for path in folder.iterdir() if path.is_file()} | set(manifests)
    _sweep(folder)
    if not converted(folder) and _pickles(folder):
        made += _convert(folder, say)
    if _no_tokenizer(names):
        made += _tokenizer(folder, manifests, say)
    return made


def _no_tokenizer(names: Set[str]) -> bool:
    """Whether a tokenizer.json can be made of the files of a model, and has to be."""
    there = any(name in names for name in TOKENIZERS) or any(n.endswith(".tiktoken") for n in names)
    return "tokenizer.json" not in names and there and choose.CONFIG in names


def converted(folder: Path) -> bool:
    """Whether there are weights as safetensors."""
    return any(
        (folder / name).is_file() for name in (choose.SAFE, choose.SAFE_INDEX, choose.ADAPTER)
    ) or any(folder.glob("*.safetensors"))


def _pickles(folder: Path) -> bool:
    return any(
        (folder / name).is_file() for name in (choose.BIN, choose.BIN_INDEX, choose.ADAPTER_BIN)
    )


def _convert(folder: Path, say: Say) -> list[str]:
    with _staging(folder) as out:
        answer = _run("kvrun.hub.convert", folder, out, say)
        if answer.get("memory"):
            raise KvrunError(
                f"the weights in {folder} need more memory to convert than they should.",
                hint="look for a version of the model with .safetensors files",
            )
        if answer:
            raise BadCheckpoint(
                f"the weights in {folder} cannot be converted.",
                cause=str(answer.get("refused") or answer.get("died")),
                hint="look for a version of the model with .safetensors files",
            )
        # The index last: shards without it are not taken for a model.
        return _move(out, folder, last=choose.SAFE_INDEX)


def _tokenizer(folder: Path, manifests: Mapping[str, Path], say: Say) -> list[str]:
    with _staging(folder) as out:
        source = out / "source"
        source.mkdir()
        small = [
            p for p in folder.iterdir() if p.suffix in (".json", ".model", ".txt", ".tiktoken")
        ]
        for name, path in {p.name: p for p in small}.items() | manifests.items():
            (source / name).symlink_to(path.resolve())
        say("making a tokenizer.json")
        answer = _run("kvrun.hub.tokenizer", source, out, say)
        shutil.rmtree(source)
        if answer.get("package"):
            raise MissingExtra(f"the tokenizer in {folder} needs packages to be read.", PACKAGES)
        if answer:
            reason = str(answer.get("refused") or answer.get("died"))
            if "trust_remote_code" in reason:
                reason = "it is code of the model's own, which is never run"
            say(f"no tokenizer.json could be made, prompts must be token ids: {reason}")
            return []
        return _move(out, folder)


def _run(module: str, source: Path, out: Path, say: Say) -> dict[str, Any]:
    """Run a module of this room with two folders; {} when it succeeds, else what it tells."""
    environment = {k: v for k, v in os.environ.items() if k not in SECRETS}
    # Found wherever kvrun runs from, and nothing else of the folder it was called in (-P).
    path = [str(PACKAGE.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    last: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(source), str(out)],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        ) as child,
    ):  # fmt: skip
        try:
            for line in child.stdout or ():
                told = _told(line)
                if "say" in told:
                    say(str(told["say"]))
                elif told:
                    last = told
            code = child.wait()
        except BaseException:
            child.kill()
            raise
        if code == 0:
            return {}
        errors.seek(max(errors.seek(0, os.SEEK_END) - 2000, 0))
        lines = errors.read().decode(errors="replace").strip().splitlines()
        died = lines[-1][:200] if lines else f"its process ended with {code}"
        if "MemoryError" in died or code == -9:
            return {"memory": True}
        return last or {"died": died}


def _told(line: bytes) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    try:
        made = Path(tempfile.mkdtemp(prefix=f"{STAGING}{os.getpid()}-", dir=folder))
    except OSError as error:
        raise KvrunError(f"{folder} cannot be written.", cause=error.strerror or "") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _move(staging: Path, folder: Path, last: str = "") -> list[str]:
    made = sorted((path.name for path in staging.iterdir()), key=lambda name: (name == last, name))
    for name in made:
        os.replace(staging / name, folder / name)
    return made


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed have left."""
    for path in folder.glob(f"{STAGING}*"):
        pid = path.name.removeprefix(STAGING).partition("-")[0]
        if not (pid.isdigit() and _alive(int(pid))):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
