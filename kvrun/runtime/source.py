"""Source: where a checkpoint's tensors come from, files or thin air; read by range, converted."""

import re
import zlib
from collections.abc import Sequence
from math import log2, prod
from pathlib import Path
from typing import Protocol

import torch

from kvrun.errors import BadCheckpoint
from kvrun.runtime.tensorfile import Stored, TensorFile, TensorFolder

Ranges = tuple[tuple[int, int], ...]
Cut = Sequence[Ranges | None]  # per dimension the ranges kept; None keeps all

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_FLOATS = ("F64", "F32", "F16", "BF16")
_WIDE = tuple(_DTYPES[name] for name in _FLOATS)
_PIECE = 16 << 20  # bytes read at once where they are cut or converted
_MISSING = 1000  # names after which a load gives up
# Masks and tables that old files carry beside their weights.
_SKIPPED = re.compile(r"(^|\.)((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
# Scales of codes, and a value at which random codes of 4 or 8 bits make weights of a usual size.
_SCALE = re.compile(r"(scales?|scale_inv|SCB|absmax)$")
_CODE_SCALE = 2.0**-10
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


class Source(Protocol):
    """Where tensors come from: files, or thin air."""

    parameters: int  # how many values there are; 0 where that is not known
    nbytes: int  # as they are stored

    def has(self, name: str, otherwise: bool) -> bool:
        """Whether there is such a tensor; a source that cannot know says `otherwise`."""

    def expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Raise BadCheckpoint, before memory is taken, if such a tensor cannot be filled."""

    def find(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of a tensor as it is stored; None where there are no files.

        Raises BadCheckpoint for a name that the files lack.
        """

    def pass_over(self, name: str) -> None:
        """A tensor that belongs to the model and is not needed."""

    def fill(self, name: str, shape: tuple[int, ...], cut: Cut, out: torch.Tensor) -> None:
        """Write the kept part of a tensor whose full shape is `shape` to `out`."""

    def skip(self, prefixes: tuple[str, ...]) -> None:
        """Names that begin so may stay unread."""

    def finish(self, layers: int) -> None:
        """Raise BadCheckpoint unless everything wanted was there, and all of it was wanted."""

    def close(self) -> None:
        """Let go of files."""


class FileSource:
    """Tensors of safetensors files."""

    def __init__(self, folder: Path) -> None:
        self._tensors = TensorFolder(folder)
        self._unread = self._tensors.names
        found = [self._tensors.find(name)[1] for name in self._unread]
        self.parameters = sum(prod(stored.shape) for stored in found)
        self.nbytes = sum(stored.nbytes for stored in found)
        self._missing: list[str] = []

    def has(self, name: str, otherwise: bool) -> bool:
        return name in self._tensors

    def expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._unread.discard(name)
        if name not in self._tensors:
            self._missing.append(name)
            if len(self._missing) == _MISSING:
                raise self._refused()
            return
        _, stored = self._tensors.find(name)
        if stored.shape != shape:
            raise self._refused(f"{name} is {list(stored.shape)}, expected {list(shape)}")
        found = _DTYPES[stored.dtype]
        alike = (stored.dtype in _FLOATS) == (dtype in _WIDE)
        if found is not dtype and (not alike or dtype.itemsize == 1):
            expected = "a float type" if dtype in _WIDE else str(dtype).removeprefix("torch.")
            raise self._refused(f"{name} is stored as {stored.dtype}, expected {expected}")

    def find(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        if name not in self._tensors:
            self._missing.append(name)
            raise self._refused()
        _, stored = self._tensors.find(name)
        return stored.shape, _DTYPES[stored.dtype]

    def pass_over(self, name: str) -> None:
        self._unread.discard(name)

    def fill(self, name: str, shape: tuple[int, ...], cut: Cut, out: torch.Tensor) -> None:
        # Once the load has failed, what follows only completes the list of what is missing; but
        # whole numbers may be indices, and are right or have been refused.
        if not self._missing or not out.dtype.is_floating_point:
            file, stored = self._tensors.find(name)
            _read(file, stored, cut, out)

    def skip(self, prefixes: tuple[str, ...]) -> None:
        self._unread = {name for name in self._unread if not name.startswith(prefixes)}

    def finish(self, layers: int) -> None:
        extra = sorted(name for name in self._unread if not _ignored(name, layers))
        if self._missing or extra:
            raise self._refused(extra=extra)

    def close(self) -> None:
        self._tensors.close()

    def _refused(self, wrong: str = "", extra: Sequence[str] = ()) -> BadCheckpoint:
        causes = [wrong] if wrong else []
        for what, names in (
            ("missing", self._missing),
            ("not part of this architecture", extra),
        ):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                causes.append(f"{what}: {', '.join(names[:5])}{more}")
        return BadCheckpoint(
            f"the weights in {self._tensors.folder} do not fit its config.json.",
            cause="; ".join(causes),
            hint="fetch the model again, or check that config.json belongs to these weights",
        )


class RandomSource:
    """Random values made on the device, the same for the same name, cut and seed."""

    parameters = nbytes = 0

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def has(self, name: str, otherwise: bool) -> bool:
        return otherwise

    def expect(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        pass

    def find(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        return None

    def pass_over(self, name: str) -> None:
        pass

    def fill(self, name: str, shape: tuple[int, ...], cut: Cut, out: torch.Tensor) -> None:
        generator = torch.Generator(out.device)
        generator.manual_seed(zlib.crc32(f"{self._seed} {name} {cut}".encode()))
        if out.dtype is torch.uint8 and _SCALE.search(name):  # powers of two
            out.fill_(127 + int(log2(_CODE_SCALE)))
            return
        if not out.dtype.is_floating_point:
            limits = torch.iinfo(out.dtype)
            out.random_(limits.min, limits.max, generator=generator)
            return
        if _SCALE.search(name):
            out.fill_(_CODE_SCALE)
            return
        if out.dtype not in _WIDE:
            out.copy_(torch.randn(out.shape, generator=generator, device=out.device))
            return
        # Products keep the size of what they are given; norms stay near one.
        out.normal_(0.0, 0.02 if len(shape) == 1 else shape[-1] ** -0.5, generator=generator)
        if len(shape) == 1 and name.endswith(".weight"):  # a norm's
            out.add_(1.0)

    def skip(self, prefixes: tuple[str, ...]) -> None:
        pass

    def finish(self, layers: int) -> None:
        pass

    def close(self) -> None:
        pass


def _ignored(name: str, layers: int) -> bool:
    layer = _LAYER.search(name)
    beyond = layer is not None and int(layer[1]) >= layers  # heads that predict further tokens
    return beyond or _SKIPPED.search(name) is not None


def kept(size: int, ranges: Ranges | None) -> int:
    return size if ranges is None else sum(stop - start for start, stop in ranges)


def _read(file: TensorFile, stored: Stored, cut: Cut, out: torch.Tensor) -> None:
    """Read only the rows kept, straight into `out` where it can take them as they are; else in
    pieces that are cut and converted, so that memory stays bounded."""
    if out.numel() == 0:
        return
    dtype, length = _DTYPES[stored.dtype], stored.shape[0] if stored.shape else 1
    row_bytes = stored.nbytes // length
    whole_rows = all(ranges is None for ranges in cut[1:])
    direct = whole_rows and out.dtype is dtype and out.device.type == "cpu"
    step = length if direct else max(1, _PIECE // row_bytes)
    at = 0
    for first, last in (cut[0] if cut else None) or ((0, length),):
        for start in range(first, last, step):
            count = min(step, last - start)
            place = out.view(-1, *out.shape[1:])[at : at + count]
            piece = place
            if not direct:
                piece = torch.empty((count, *stored.shape[1:]), dtype=dtype)
            file.read_into(stored.start + start * row_bytes, _bytes_of(piece))
            if not direct:
                place.copy_(_columns(piece, cut))
            at += count


def _columns(piece: torch.Tensor, cut: Cut) -> torch.Tensor:
    for dim, ranges in enumerate(cut[1:], start=1):
        if ranges is not None:
            piece = torch.cat([piece.narrow(dim, a, b - a) for a, b in ranges], dim)
    return piece


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
