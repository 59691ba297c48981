"""Image: one image as its model's processor has made it: arrays as plain bytes, and their hash."""

from collections.abc import Mapping
from hashlib import blake2b
from math import prod
from typing import TYPE_CHECKING

import msgspec

from kvrun.errors import InvalidRequest

if TYPE_CHECKING:
    import numpy as np

SIZES = {"float32": 4, "int64": 8, "uint8": 1}  # bytes of a value, by the types that occur


class Array(msgspec.Struct, frozen=True, array_like=True):
    """Values in C order, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """What towers take in of one image, by the processor's names; equal images have one digest."""

    arrays: dict[str, Array]
    digest: bytes

    @classmethod
    def of(cls, arrays: "Mapping[str, np.ndarray]") -> "Image":
        """Raises InvalidRequest for arrays of other types than SIZES."""
        made: dict[str, Array] = {}
        found = blake2b(digest_size=32)
        for name in sorted(arrays):
            array = arrays[name]
            if array.dtype.name not in SIZES:
                raise InvalidRequest(f"the array '{name}' of an image is {array.dtype.name}.")
            made[name] = Array(array.dtype.name, array.shape, array.tobytes())
            found.update(repr((name, array.dtype.name, array.shape)).encode())
            found.update(made[name].data)
        return cls(arrays=made, digest=found.digest())

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of an array, which has so many dimensions.

        Raises InvalidRequest for one that is not there, or not of the shape and type it says.
        """
        array = self.arrays.get(name)
        if array is None or len(array.shape) != dims or array.dtype not in SIZES:
            raise InvalidRequest(f"an image has no array '{name}' of {dims} dimensions.")
        size = prod(array.shape) * SIZES[array.dtype]
        if min(array.shape) < 1 or size != len(array.data):
            raise InvalidRequest(f"the array '{name}' of an image is not of the size it says.")
        return array.shape

    def numbers(self, name: str) -> list[int]:
        """A list of whole numbers. Raises InvalidRequest for what is none, or as `shape` does."""
        self.shape(name, 1)
        if self.arrays[name].dtype != "int64":
            raise InvalidRequest(f"the array '{name}' of an image holds no whole numbers.")
        return memoryview(self.arrays[name].data).cast("q").tolist()
