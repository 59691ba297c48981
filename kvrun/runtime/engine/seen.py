"""Seen: the images of one prompt, where their features go, and what the prefix cache calls them."""

import os
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np

from kvrun.errors import InvalidRequest
from kvrun.runtime.engine.request import Request
from kvrun.runtime.engine.sequence import Source
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


class Seen(Protocol):
    """`sources` are images that are attended to, beside the prompt."""

    sources: list[Source]

    def named(self, tokens: Sequence[int], start: int, stop: int) -> list[int]:
        """A sequence's `tokens` from `start` to `stop`, by what their keys and values depend on.

        Equal ids that show other images have other ones. These names are no ids, and cannot be
        found out to make two images look alike.
        """

    def between(self, start: int, stop: int) -> Iterator[Part]:
        """What stands at positions `start` to `stop`."""

    def runs(self, start: int, stop: int) -> list[tuple[int, int | None]]:
        """Positions `start` to `stop` by what they attend to: (how many, which of `sources`)."""


class Placed:
    """`counts` features of each image stand at `positions`, in order."""

    def __init__(self, request: Request, counts: list[int], positions: np.ndarray) -> None:
        self.sources: list[Source] = []
        self._images = request.images
        self._ends = np.cumsum([0, *counts])
        self._positions = positions
        self._names = list(request.prompt_ids)
        for image, (first, last) in zip(request.images, pairwise(self._ends), strict=True):
            words = _words(image)
            for n, position in enumerate(positions[first:last].tolist()):
                self._names[position] = -1 - words[n % _WORDS]

    def named(self, tokens: Sequence[int], start: int, stop: int) -> list[int]:
        return self._names[start:stop] + list(tokens[max(start, len(self._names)) : stop])

    def between(self, start: int, stop: int) -> Iterator[Part]:
        first, last = np.searchsorted(self._positions, (start, stop)).tolist()
        for image, (begin, end) in zip(self._images, pairwise(self._ends.tolist()), strict=True):
            low, high = max(first, begin), min(last, end)
            if low < high:
                yield Part(image, low - begin, high - begin, self._positions[low:high])

    def runs(self, start: int, stop: int) -> list[tuple[int, int | None]]:
        return [(stop - start, None)]


class Attended:
    """A token sees the last image before it, unless the text it belongs to has begun since, and
    what answers sees what the prompt's last token does."""

    def __init__(self, request: Request, places: Places) -> None:
        ids = np.asarray(request.prompt_ids)
        at = np.arange(len(ids))
        shows = np.maximum.accumulate(np.where(ids == places.token, at, -1))
        ended = np.maximum.accumulate(np.where(ids == places.ends, at, -1))
        ended = np.concatenate(([-1], ended[:-1]))  # the end itself belongs to its text
        digests = [image.digest for image in request.images]
        found = {image.digest: image for image in request.images}
        self.sources = [
            Source(digest, places.attended, image=image) for digest, image in found.items()
        ]
        which = np.array([list(found).index(digest) for digest in digests])
        self._seen: list[int] = np.where(
            ended > shows, -1, np.append(which, -1)[(ids == places.token).cumsum() - 1]
        ).tolist()
        self._words = [_words(image) for image in found.values()]

    def named(self, tokens: Sequence[int], start: int, stop: int) -> list[int]:
        names: list[int] = []
        for position, token in enumerate(tokens[start:stop], start):
            seen = self._at(position)
            shown = -1 - (self._words[seen][position % _WORDS] ^ token)
            names.append(token if seen < 0 else shown)
        return names

    def between(self, start: int, stop: int) -> Iterator[Part]:
        return iter(())

    def runs(self, start: int, stop: int) -> list[tuple[int, int | None]]:
        runs: list[tuple[int, int | None]] = []
        for position in range(start, stop):
            seen = self._at(position)
            which = None if seen < 0 else seen
            if runs and runs[-1][1] == which:
                runs[-1] = (runs[-1][0] + 1, which)
            else:
                runs.append((1, which))
        return runs

    def _at(self, position: int) -> int:
        return self._seen[min(position, len(self._seen) - 1)]


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
        what = f"the images have {sum(counts):,} features; the prompt has {len(positions):,} places"
        if places.attended:
            images = "is 1 image" if len(counts) == 1 else f"are {len(counts)} images"
            what = f"there {images}; the prompt has {len(positions):,} places"
        raise InvalidRequest(f"{what} for them (tokens {places.token}).")
    return Attended(request, places) if places.attended else Placed(request, counts, positions)


def _words(image: Image) -> list[int]:
    digest = blake2b(image.digest, key=_SECRET, digest_size=8 * _WORDS).digest()
    return [int(word >> 1) for word in np.frombuffer(digest, np.uint64)]
