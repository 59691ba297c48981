"""Checkpoint, Shard: named tensors on disk, cut for this rank, straight to device and dtype."""

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.parallel import Group
from kvrun.runtime.tensorfile import Stored, TensorFile, TensorFolder

if TYPE_CHECKING:
    from kvrun.runtime.quant import Weight

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
# Bytes of a value that is rounded as it is read, with its share of scales.
WIDTHS = {"int8": 1.01, "fp8": 1.01, "int4": 0.54, "nf4": 0.57, "fp4": 0.57}
_PIECE = 16 << 20  # bytes read at once where they are cut or converted
_MISSING = 1000  # names after which a load gives up
# Masks and tables that old files carry beside their weights.
_SKIPPED = re.compile(r"(^|\.)(attn\.bias|attn\.masked_bias|attention\.bias|rotary_emb\.inv_freq)$")
# Scales of codes, and a value at which random codes of 4 or 8 bits make weights of a usual size.
_SCALE = re.compile(r"(scales?|scale_inv|SCB|absmax)$")
_CODE_SCALE = 2.0**-10
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Shard:
    """A stored matrix, `name` without its suffix, and the part of it that this rank keeps.

    The full matrix is [out_features, in_features]; `rows` and `cols` are ranges of it, in the
    order in which they are wanted, None for all.
    """

    name: str
    out_features: int
    in_features: int
    rows: Ranges | None = None
    cols: Ranges | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """What is kept of (out_features, in_features)."""
        return _kept(self.out_features, self.rows), _kept(self.in_features, self.cols)


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

    def skip(self, name: str) -> None:
        """A tensor that belongs to the model and is not needed."""

    def fill(self, name: str, shape: tuple[int, ...], cut: Cut, out: torch.Tensor) -> None:
        """Write the kept part of a tensor whose full shape is `shape` to `out`."""

    def finish(self, layers: int) -> None:
        """Raise BadCheckpoint unless everything wanted was there, and all of it was wanted."""

    def close(self) -> None:
        """Let go of files."""


class Checkpoint:
    """A model's folder: its configuration, and its tensors by the names in the file.

    `load_format` "dummy" answers every name with random values and needs only config.json.
    `quantize` (of config.QUANTIZE): how matrices are rounded as they are read. Raises NotFound or
    BadCheckpoint for a folder that is not a readable model, Unsupported for one whose matrices are
    quantized already.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        group: Group = Group(),  # noqa: B008 - frozen
        load_format: str = "auto",
        quantize: str | None = None,
        seed: int = 0,
    ) -> None:
        self.config = HFConfig.read(folder)
        self.quantize = quantize
        # What reads matrices in the place of `quant`, for those who look on.
        self.reader: Callable[[Sequence[Shard], bool], Weight] | None = None
        if quantize and (stored := self.config.quant_method):
            raise Unsupported(
                f"the weights are quantized already, as '{stored}'.",
                hint="leave quantize out, or name the model in 16 or 32 bits",
            )
        self.device = torch.device(device)
        self.dtype = dtype
        self.group = group
        self.parameter_bytes = 0  # of what was read, as this rank holds it
        dummy = load_format == "dummy"
        self._source: Source = RandomSource(seed) if dummy else FileSource(Path(folder))

    @property
    def needed_bytes(self) -> int:
        """What the weights will take, at most; 0 where there are no files."""
        if self.config.quant_method:
            return self._source.nbytes
        if self.quantize in ("int8", "int4") or (self.quantize and self.device.type != "cpu"):
            return int(self._source.parameters * WIDTHS[self.quantize])
        return self._source.parameters * self.dtype.itemsize

    def settle(self, before: int, kept: int) -> None:
        """What was read since there were `before` bytes has become `kept` bytes in memory."""
        self.parameter_bytes = before + kept

    def has(self, name: str, otherwise: bool) -> bool:
        """Whether the file holds `name`; `otherwise` where there is no file."""
        return self._source.has(name, otherwise)

    def find(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, any_rank: bool = False
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `name` in the file; the ones given where there is no file.

        Raises BadCheckpoint for a tensor that the file lacks, or that has another number of
        dimensions where that is not `any_rank`.
        """
        found = self._source.find(name) or (shape, dtype)
        if len(found[0]) != len(shape) and not any_rank:
            self._source.expect(name, shape, dtype)
        return found

    def skip(self, *names: str) -> None:
        """Tensors that belong to the model and are not needed: `finish` does not miss them."""
        for name in names:
            self._source.skip(name)

    def read(
        self,
        name: str,
        shape: tuple[int, ...],
        cut: Cut | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The tensor `name`, whose full shape is `shape`, or the ranges `cut` keeps of it.

        Raises BadCheckpoint for another shape; names that are missing are reported by `finish`,
        those of whole numbers at once.
        """
        dtype = dtype or self.dtype
        if not dtype.is_floating_point:
            self._source.find(name)
        self._source.expect(name, shape, dtype)
        cut = cut or (None,) * len(shape)
        kept = tuple(_kept(size, ranges) for size, ranges in zip(shape, cut, strict=True))
        out = torch.empty(kept, dtype=dtype, device=self.device)
        self._fill(name, shape, cut, out)
        return out

    def matrix(self, *shards: Shard, suffix: str = "weight") -> torch.Tensor:
        """The kept parts [out, in] of plain matrices, one below the other."""
        for s in shards:
            shape = (s.out_features, s.in_features)
            self._source.expect(f"{s.name}.{suffix}", shape, self.dtype)
        rows, cols = sum(s.shape[0] for s in shards), shards[0].shape[1]
        out = torch.empty((rows, cols), dtype=self.dtype, device=self.device)
        at = 0
        for s in shards:
            part = out[at : at + s.shape[0]]
            self._fill(
                f"{s.name}.{suffix}", (s.out_features, s.in_features), (s.rows, s.cols), part
            )
            at += len(part)
        return out

    def vector(self, *shards: Shard, suffix: str = "bias") -> torch.Tensor:
        """The kept parts [out] of vectors with one value for each output row."""
        return torch.cat(
            [self.read(f"{s.name}.{suffix}", (s.out_features,), (s.rows,)) for s in shards]
        )

    def _fill(self, name: str, shape: tuple[int, ...], cut: Cut, out: torch.Tensor) -> None:
        # All of a dimension is no cut: such rows are read as they lie.
        pairs = zip(shape, cut, strict=True)
        needed = [None if ranges == ((0, size),) else ranges for size, ranges in pairs]
        self._source.fill(name, shape, needed, out)
        self.parameter_bytes += out.nbytes

    def close(self) -> None:
        """Let go of the files; nothing can be read afterwards."""
        self._source.close()

    def finish(self) -> None:
        """Raise BadCheckpoint if the folder holds other tensors than were read."""
        self._source.finish(self.config.integer("num_hidden_layers"))


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

    def skip(self, name: str) -> None:
        self._unread.discard(name)

    def fill(self, name: str, shape: tuple[int, ...], cut: Cut, out: torch.Tensor) -> None:
        # Once the load has failed, what follows only completes the list of what is missing; but
        # whole numbers may be indices, and are right or have been refused.
        if not self._missing or not out.dtype.is_floating_point:
            file, stored = self._tensors.find(name)
            _read(file, stored, cut, out)

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

    def skip(self, name: str) -> None:
        pass

    def fill(self, name: str, shape: tuple[int, ...], cut: Cut, out: torch.Tensor) -> None:
        generator = torch.Generator(out.device)
        generator.manual_seed(zlib.crc32(f"{self._seed} {name} {cut}".encode()))
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
        if name.endswith("norm.weight"):
            out.add_(1.0)

    def finish(self, layers: int) -> None:
        pass

    def close(self) -> None:
        pass


def _ignored(name: str, layers: int) -> bool:
    layer = _LAYER.search(name)
    beyond = layer is not None and int(layer[1]) >= layers  # heads that predict further tokens
    return beyond or _SKIPPED.search(name) is not None


def _kept(size: int, ranges: Ranges | None) -> int:
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
