"""LLaVA-NeXT (1.6): the whole image in one square, and again in tiles without their padding.
Source: transformers, models/llava_next/modeling_llava_next.py."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvrun.runtime.image import Image
from kvrun.runtime.text import places
from kvrun.runtime.text.places import PIXELS, SIZES
from kvrun.runtime.vision.encoder import values
from kvrun.runtime.vision.towers.llava import Llava

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


def build(w: "Checkpoint") -> "LlavaNext":
    return LlavaNext(w, places.LlavaNext(w.config))


class LlavaNext(Llava[places.LlavaNext]):
    """Rows of patches over all tiles, each with the learned newline behind it."""

    def __init__(self, w: "Checkpoint", where: places.LlavaNext) -> None:
        super().__init__(w, where)
        name = w.prefix("image_newline", "", "model.") + "image_newline"
        self._newline = w.read(name, (self.hidden,))

    def __call__(self, image: Image) -> torch.Tensor:
        (rows, columns), (above, beside) = self.places.grid(image)
        features = self.squares(values(image, PIXELS, 4))
        side, hidden = self.places.side, features.shape[-1]
        x = features[1:].view(rows, columns, side, side, hidden).transpose(1, 2)
        x = x.reshape(rows * side, columns * side, hidden)
        x = x[above : len(x) - above, beside : x.shape[1] - beside]
        x = torch.cat((x, self._newline.expand(len(x), 1, hidden)), dim=1)
        return torch.cat((features[0], x.flatten(0, 1)))

    def largest(self) -> Image:
        size = self.places.size
        height, width = max(self.places.sizes, key=lambda pair: pair[0] * pair[1])
        tiles = 1 + (height // size) * (width // size)
        pixels = np.zeros((tiles, 3, size, size), np.float32)
        return Image.of({PIXELS: pixels, SIZES: np.array([height, width])})
