"""TensorFile, TensorFolder: safetensors on disk; headers checked, bytes read by range, no mmap."""

import json
import os
import re
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from kvrun.errors import BadCheckpoint, NotFound, Unsupported

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_TENSORS = 100_000
_ENTRY = {"dtype", "shape", "data_offsets"}
# Names are identifiers with dots; anything else (paths, control characters) has no business here.
_NAME = re.compile(r"[A-Za-z0-9_.\-:+]{1,512}")


def share(path: Path) -> None:
    """Let others read a file that safetensors has written, as the umask has it for new files.

    It writes beside and renames, and what it renames only its owner can read.
    """
    mask = os.umask(0o077)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


class Stored(NamedTuple):
    """Where a tensor lies: `start` is its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class TensorFile:
    """One safetensors file. Raises BadCheckpoint, naming file and reason, for a malformed one.

    Reads copy: a file that is truncated later cannot hurt who has read it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise BadCheckpoint(f"{path} cannot be read.", cause=error.strerror or "") from error
        try:
            self.tensors = self._header(path.stat().st_size)
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on."""
        try:
            self._file.seek(start)
            done = 0
            while done < len(buffer):
                count = self._file.readinto(buffer[done:])
                if not count:
                    raise self._bad("it ends before its last tensor does")
                done += count
        except OSError as error:
            raise self._bad(error.strerror or "it cannot be read") from error

    def _bad(self, reason: str) -> BadCheckpoint:
        return BadCheckpoint(
            f"{self.path} is not a valid safetensors file.",
            cause=reason,
            hint="fetch the model again",
        )

    def _header(self, size: int) -> dict[str, Stored]:
        if size < 8:
            raise self._bad(f"it has {size} bytes, too few for a header")
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > _MAX_HEADER:
            raise self._bad(f"its header claims {length} bytes; the limit is {_MAX_HEADER}")
        if 8 + length > size:
            raise self._bad(f"its header claims {length} bytes, the file has {size}")
        values = self._json(self._bytes(8, length))
        values.pop("__metadata__", None)
        if len(values) > _MAX_TENSORS:
            raise self._bad(f"it lists {len(values)} tensors; the limit is {_MAX_TENSORS}")
        base = 8 + length
        tensors = {name: self._stored(name, entry, base) for name, entry in values.items()}
        self._covers(tensors, base, size)
        return tensors

    def _bytes(self, start: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def _json(self, raw: bytes) -> dict[str, Any]:
        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            values = dict(pairs)
            if len(values) != len(pairs):
                raise ValueError("it names something twice")
            return values

        try:
            values = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise self._bad(f"its header is not JSON: {str(error)[:120]}") from error
        if not isinstance(values, dict):
            raise self._bad("its header is not a JSON object")
        return values

    def _stored(self, name: str, entry: Any, base: int) -> Stored:
        if not _NAME.fullmatch(name):
            raise self._bad(f"it names a tensor {name[:60]!r}")
        if not isinstance(entry, dict) or entry.keys() != _ENTRY:
            raise self._bad(f"its entry for {name} is not a dtype, a shape and two offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
            raise self._bad(f"{name} has the unknown dtype {str(dtype)[:40]!r}")
        if not _counts(shape) or len(shape) > 8:
            raise self._bad(f"{name} has the shape {str(shape)[:60]}")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise self._bad(f"{name} has the offsets {str(offsets)[:60]}")
        start, stop = offsets
        if prod(shape) * ITEM_SIZE[dtype] != stop - start:
            raise self._bad(f"{name} has {stop - start} bytes, its shape {shape} needs others")
        return Stored(dtype, tuple(shape), base + start, stop - start)

    def _covers(self, tensors: dict[str, Stored], base: int, size: int) -> None:
        """Tensors must lie end to end from the header to the end of the file."""
        at = base
        for name, stored in sorted(tensors.items(), key=lambda t: (t[1].start, t[1].nbytes)):
            if stored.start != at:
                what = "overlaps another tensor" if stored.start < at else "leaves a gap before it"
                raise self._bad(f"{name} {what}")
            at += stored.nbytes
        if at > size:
            raise self._bad(f"it is truncated: its tensors need {at} bytes, it has {size}")
        if at < size:
            raise self._bad(f"{size - at} bytes follow its last tensor")


class TensorFolder:
    """Every tensor of a model's folder: one model.safetensors, or shards with an index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, TensorFile] = {}
        try:
            if (folder / SINGLE).exists():
                self._where = dict.fromkeys(self._open(SINGLE).tensors, SINGLE)
            elif (folder / INDEX).exists():
                self._where = self._indexed()
            else:
                raise _no_weights(folder)
        except BaseException:
            self.close()
            raise

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def find(self, name: str) -> tuple[TensorFile, Stored]:
        file = self._files[self._where[name]]
        return file, file.tensors[name]

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _open(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = TensorFile(self.folder / name)
        return self._files[name]

    def _indexed(self) -> dict[str, str]:
        path = self.folder / INDEX
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadCheckpoint(f"{path} is not JSON.", cause=str(error)[:120]) from error
        where = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(where, dict) or not where:
            raise BadCheckpoint(f"{path} has no weight_map.")
        shards = sorted({str(file) for file in where.values()})
        for file in shards:
            if not _NAME.fullmatch(file) or file.startswith("."):
                raise BadCheckpoint(f"{path} names a shard {file[:60]!r}.")
        gone = [file for file in shards if not (self.folder / file).is_file()]
        if gone:
            raise BadCheckpoint(
                f"{self.folder} is incomplete: {len(gone)} of {len(shards)} shards are missing.",
                cause=", ".join(gone[:5]),
                hint="fetch the model again",
            )
        held = {name: file for file in shards for name in self._open(file).tensors}
        lost = sorted(set(where) - set(held))
        if lost:
            raise BadCheckpoint(
                f"{path} lists {len(lost)} tensors that no shard holds.",
                cause=", ".join(lost[:5]),
                hint="fetch the model again",
            )
        return held


def _counts(value: Any) -> bool:
    if not isinstance(value, list) or not {int}.issuperset(map(type, value)):
        return False
    return not value or (min(value) >= 0 and max(value) < 2**63)


def _no_weights(folder: Path) -> NotFound | Unsupported:
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        return Unsupported(
            f"{folder} holds its weights as pickled files, which can run code when they are read.",
            hint=f"kvrun pull {folder} writes them as safetensors",
        )
    if any(folder.glob("*.gguf")):
        return Unsupported(
            f"{folder} holds its weights as GGUF.",
            hint="pull the repository that holds the model as safetensors",
        )
    return NotFound(f"{folder} holds no weights.", cause=f"neither {SINGLE} nor {INDEX} is there")
