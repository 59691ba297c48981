"""Seen: the images of one prompt, where their features go, and what the prefix cache calls them."""

import os
from collections.abc import Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvrun.errors import InvalidRequest
from kvrun.runtime.engine.request import Request
from kvrun.runtime.image import Image
from kvrun.runtime.text.places import Places

_SECRET = os.urandom(16)
_WORDS = 8  # of 63 bits, by which the features of an image are called in turn


class Part(NamedTuple):
    """Features `start` to `stop` of an image stand at `positions` of the prompt."""

    image: Image
    start: int
    stop: int
    positions: np.ndarray


class Seen:
    """`counts` features of each image stand at `positions`, in order."""

    def __init__(self, request: Request, counts: list[int], positions: np.ndarray) -> None:
        self._images = request.images
        self._ends = np.cumsum([0, *counts])
        self._positions = positions
        # Equal ids that stand for other images have other keys and values. These names are no
        # ids, and cannot be found out to make two images look alike.
        self.names = list(request.prompt_ids)
        for image, (first, last) in zip(request.images, pairwise(self._ends), strict=True):
            words = _words(image)
            for n, position in enumerate(positions[first:last].tolist()):
                self.names[position] = words[n % _WORDS]

    def between(self, start: int, stop: int) -> Iterator[Part]:
        """What stands at positions `start` to `stop`."""
        first, last = np.searchsorted(self._positions, (start, stop)).tolist()
        for image, (begin, end) in zip(self._images, pairwise(self._ends.tolist()), strict=True):
            low, high = max(first, begin), min(last, end)
            if low < high:
                yield Part(image, low - begin, high - begin, self._positions[low:high])


def look(request: Request, places: Places | None) -> Seen | None:
    """The images of a request, None without any.

    Raises InvalidRequest for images that the model does not take, or that the prompt has other
    places for than they have features.
    """
    if not request.images:
        return None
    if places is None:
        raise InvalidRequest("the model reads only text; it takes no images.")
    counts = [places.count(image) for image in request.images]
    positions = np.flatnonzero(np.asarray(request.prompt_ids) == places.token)
    if len(positions) != sum(counts):
        raise InvalidRequest(
            f"the images have {sum(counts):,} features; the prompt has {len(positions):,} places "
            f"for them (tokens {places.token})."
        )
    return Seen(request, counts, positions)


def _words(image: Image) -> list[int]:
    digest = blake2b(image.digest, key=_SECRET, digest_size=8 * _WORDS).digest()
    return [-1 - int(word >> 1) for word in np.frombuffer(digest, np.uint64)]
