"""Checkpoint, Shard: named tensors on disk, cut for this rank, straight to device and dtype."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch

from kvrun.errors import Unsupported
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.parallel import Group
from kvrun.runtime.source import Cut, FileSource, RandomSource, Ranges, Source, kept

if TYPE_CHECKING:
    from kvrun.runtime.quant import Weight

# Bytes of a value that is rounded as it is read, with its share of scales.
WIDTHS = {"int8": 1.01, "fp8": 1.01, "int4": 0.54, "nf4": 0.57, "fp4": 0.57}


@dataclass(frozen=True)
class Shard:
    """A stored matrix, `name` without its suffix, and the part of it that this rank keeps.

    The full matrix is [out_features, in_features]; `rows` and `cols` are ranges of it, in the
    order in which they are wanted, None for all. `transposed`: it is stored [in, out].
    """

    name: str
    out_features: int
    in_features: int
    rows: Ranges | None = None
    cols: Ranges | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """What is kept of (out_features, in_features)."""
        return kept(self.out_features, self.rows), kept(self.in_features, self.cols)


class Product(tuple[Shard, ...]):
    """A matrix that adapters can change, as the shards whose rows are its output.

    `role` is "linear", "by head" (multiplied in parts, see layers/mla.py), "embedding" (its input
    are ids; [hidden, vocab]), "head" (its input are the rows that are wanted) "experts" (`copies`
    matrices of this shape; where each is stored in `parts`, they are named "N.part"), or a vector:
    "norm", or "gain" where it has no bias.
    """

    role: str
    copies: int
    parts: tuple[str, ...]

    def __new__(
        cls,
        shards: Iterable[Shard],
        role: str = "linear",
        copies: int = 1,
        parts: tuple[str, ...] = (),
    ) -> Self:
        product = super().__new__(cls, shards)
        product.role, product.copies, product.parts = role, copies, parts
        return product


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
        self.products: list[Product] = []  # what adapters can change
        self.dummy = dummy = load_format == "dummy"
        self._renamed: dict[str, str] = {}
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
        return self._source.has(self._stored(name), otherwise)

    def refuse_float16(self) -> None:
        """Raise Unsupported for a family whose layers reach beyond what float16 can say."""
        if self.dtype is torch.float16:
            raise Unsupported(
                f"layers of '{self.config.text('model_type')}' overflow float16.",
                hint="dtype='bfloat16' or 'float32'",
            )

    def prefix(self, tensor: str, *choices: str) -> str:
        """Which of `choices` stands before `tensor` in the file; the first one where there is no
        file, or none of them does."""
        found = (prefix for prefix in choices if self.has(prefix + tensor, otherwise=True))
        return next(found, choices[0])

    def rename(self, prefix: str, stored: str) -> None:
        """Names that begin with `prefix` begin with `stored` in the file."""
        self._renamed[prefix] = stored

    def _stored(self, name: str) -> str:
        found = (old for old in self._renamed if name.startswith(old))
        return next((self._renamed[old] + name[len(old) :] for old in found), name)

    def find(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, any_rank: bool = False
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of `name` in the file; the ones given where there is no file.

        Raises BadCheckpoint for a tensor that the file lacks, or that has another number of
        dimensions where that is not `any_rank`.
        """
        found = self._source.find(self._stored(name)) or (shape, dtype)
        if len(found[0]) != len(shape) and not any_rank:
            self._source.expect(self._stored(name), shape, dtype)
        return found

    def pass_over(self, *names: str) -> None:
        """Tensors that belong to the model and are not needed: `finish` does not miss them."""
        for name in names:
            self._source.pass_over(self._stored(name))

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
            self._source.find(self._stored(name))
        self._source.expect(self._stored(name), shape, dtype)
        cut = cut or (None,) * len(shape)
        sizes = tuple(kept(size, ranges) for size, ranges in zip(shape, cut, strict=True))
        out = torch.empty(sizes, dtype=dtype, device=self.device)
        self._fill(name, shape, cut, out)
        return out

    def matrix(self, *shards: Shard, suffix: str = "weight") -> torch.Tensor:
        """The kept parts [out, in] of plain matrices, one below the other."""
        for s in shards:
            shape = (s.out_features, s.in_features)
            shape = shape[::-1] if s.transposed else shape
            self._source.expect(self._stored(f"{s.name}.{suffix}"), shape, self.dtype)
        rows, cols = sum(s.shape[0] for s in shards), shards[0].shape[1]
        out = torch.empty((rows, cols), dtype=self.dtype, device=self.device)
        at = 0
        for s in shards:
            part = out[at : at + s.shape[0]]
            name, shape = f"{s.name}.{suffix}", (s.out_features, s.in_features)
            if s.transposed:
                stored = torch.empty(s.shape[::-1], dtype=self.dtype, device=self.device)
                self._fill(name, shape[::-1], (s.cols, s.rows), stored)
                part.copy_(stored.t())
            else:
                self._fill(name, shape, (s.rows, s.cols), part)
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
        self._source.fill(self._stored(name), shape, needed, out)
        self.parameter_bytes += out.nbytes

    def skip(self, *prefixes: str) -> None:
        """Tensors whose names begin so are not asked for, and not missed by `finish`."""
        self._source.skip(prefixes)

    def close(self) -> None:
        """Let go of the files; nothing can be read afterwards."""
        self._source.close()

    def finish(self) -> None:
        """Raise BadCheckpoint if the folder holds other tensors than were read."""
        self._source.finish(self.config.integer("num_hidden_layers"))
