"""Image: one image as its model's processor has made it: arrays as plain bytes, and their hash."""

from collections.abc import Mapping
from hashlib import blake2b
from math import prod

import msgspec
import numpy as np

from kvrun.errors import InvalidRequest

DTYPES = ("float32", "int64", "uint8")


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
    def of(cls, arrays: Mapping[str, np.ndarray]) -> "Image":
        """Raises InvalidRequest for arrays of other types than DTYPES."""
        made: dict[str, Array] = {}
        found = blake2b(digest_size=32)
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            if array.dtype.name not in DTYPES:
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
        if array is None or len(array.shape) != dims or array.dtype not in DTYPES:
            raise InvalidRequest(f"an image has no array '{name}' of {dims} dimensions.")
        size = prod(array.shape) * np.dtype(array.dtype).itemsize
        if min(array.shape) < 1 or size != len(array.data):
            raise InvalidRequest(f"the array '{name}' of an image is not of the size it says.")
        return array.shape

    def values(self, name: str, dims: int) -> np.ndarray:
        """An array, read-only; raises as `shape` does."""
        shape = self.shape(name, dims)
        array = self.arrays[name]
        return np.frombuffer(array.data, array.dtype).reshape(shape)
