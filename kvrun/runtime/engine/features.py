"""Features: what a model's eyes make of images, kept by the images' hashes."""

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch

from kvrun.runtime.batch import Batch
from kvrun.runtime.engine.scheduler import Schedule
from kvrun.runtime.image import Image
from kvrun.runtime.layers.decoder import Decoder
from kvrun.runtime.vision import Vision

# Of the memory that is free beside the weights, and no more than that; but for one image at least.
FRACTION, BYTES = 0.02, 256 << 20


class Features:
    """An image is looked at when the first of its rows is computed, one at a time; its features
    stay until others, used later, need their place. They take `limit` bytes at most."""

    def __init__(self, vision: Vision, limit: int) -> None:
        self.limit = limit
        self._vision = vision
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()

    @classmethod
    def of(cls, model: Decoder, dtype: torch.dtype, free: int) -> "Features | None":
        """With a share of `free` bytes; None for a model that sees nothing."""
        if model.vision is None:
            return None
        places = model.vision.places
        values = (places.attended or places.count(model.vision.largest())) * model.vision.hidden
        largest = values * dtype.itemsize
        return cls(model.vision, max(largest, min(int(free * FRACTION), BYTES)))

    def put(
        self,
        schedule: Schedule,
        batch: Batch,
        send: Callable[[Sequence[int]], Sequence[torch.Tensor]],
    ) -> None:
        """Have the batch of a step show the images that its rows stand for."""
        rows: list[int] = []
        states: list[torch.Tensor] = []
        first = 0
        for row in schedule:
            if row.sequence.seen is not None:
                for part in row.sequence.seen.between(row.start, row.start + row.count):
                    rows += (part.positions - row.start + first).tolist()
                    states.append(self.look(part.image)[part.start : part.stop])
            first += row.count
        if rows:
            batch.image_rows = send(rows)[0]
            batch.image_states = torch.cat(states)

    def look(self, image: Image) -> torch.Tensor:
        """The features [features, hidden] of an image."""
        found = self._kept.pop(image.digest, None)
        if found is None:
            found = self._vision(image)
        self._kept[image.digest] = found
        while sum(kept.nbytes for kept in self._kept.values()) > self.limit:
            self._kept.popitem(last=False)
        return found


def shows(schedule: Schedule) -> bool:
    """Whether a row of a step stands for an image, or may attend to one."""
    return any(
        row.sequence.sources
        or any(True for _ in row.sequence.seen.between(row.start, row.start + row.count))
        for row in schedule
        if row.sequence.seen is not None
    )
