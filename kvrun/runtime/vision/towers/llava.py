"""LLaVA 1.5: CLIP's patches, projected. Source: transformers, models/llava/modeling_llava.py."""

from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch

from kvrun.runtime.image import Image
from kvrun.runtime.text import places
from kvrun.runtime.text.places import PIXELS
from kvrun.runtime.vision.encoder import Encoder, Projector, values

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint

# What CLIP-L of 336 pixels, which nearly all of them have, leaves unsaid.
USUAL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_Places = TypeVar("_Places", bound=places.Llava)


def build(w: "Checkpoint") -> "Llava[places.Llava]":
    return Llava(w, places.Llava(w.config))


class Llava(Generic[_Places]):
    """Features are states of one layer or several of CLIP or SigLIP, through an MLP."""

    def __init__(self, w: "Checkpoint", where: _Places) -> None:
        c = w.config
        self.places = where
        self._device, self._dtype = w.device, w.dtype
        said = c.get("vision_feature_layer", -2)
        layers = said if isinstance(said, list) else [said]
        vision = c.part("vision_config")
        vision.defaults(**USUAL)
        tower = w.prefix(
            "embeddings.patch_embedding.weight",
            "vision_tower.vision_model.",
            "model.vision_tower.vision_model.",
            "vision_tower.",
            "model.vision_tower.",
        )
        clip = where.classed
        self._tower = Encoder(
            w, vision, tower, wanted=layers, classed=clip,
            act="quick_gelu" if clip else "gelu_pytorch_tanh", eps=1e-5 if clip else 1e-6,
        )  # fmt: skip
        bias = c.flag("multimodal_projector_bias", True)
        wide = self._tower.hidden * len(layers)
        own = w.prefix("linear_1.weight", "multi_modal_projector.", "model.multi_modal_projector.")
        act = c.text("projector_hidden_act", "gelu")
        self.hidden = c.integer("hidden_size", 4096)
        self._project = Projector(w, own, wide, self.hidden, act, bias=bias)

    def __call__(self, image: Image) -> torch.Tensor:
        self.places.count(image)
        return self.squares(values(image, PIXELS, 3)[None]).flatten(0, 1)

    def squares(self, pixels: np.ndarray) -> torch.Tensor:
        """Features [squares, places.base, hidden] of pixels [squares, 3, size, size]."""
        sent = torch.from_numpy(pixels).to(self._device, self._dtype)
        states = [x[:, 1:] if self.places.cut else x for x in self._tower(sent)]
        x = torch.cat(states, dim=-1)
        return self._project(x.flatten(0, 1)).view(len(x), x.shape[1], -1)

    def largest(self) -> Image:
        return Image.of({PIXELS: np.zeros((3, self.places.size, self.places.size), np.float32)})
