"""Idefics 9b: CLIP's patches and its class, then a perceiver, whose latents the text attends to.
Source: transformers, models/idefics/vision.py and perceiver.py."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvrun.runtime.image import Image
from kvrun.runtime.layers.mlp import MLP
from kvrun.runtime.layers.norm import LayerNorm, layer_norm
from kvrun.runtime.layers.qkv import cut_heads
from kvrun.runtime.text import places
from kvrun.runtime.text.places import PIXELS
from kvrun.runtime.vision.encoder import Encoder, values
from kvrun.runtime.vision.perceiver import Perceiver, PerceiverLayer

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint

USUAL = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
}
EPS = 1e-5  # of all norms


def build(w: "Checkpoint") -> "Idefics":
    return Idefics(w)


class Idefics:
    """Features are not those of the text's width: layers that attend to them have matrices."""

    def __init__(self, w: "Checkpoint") -> None:
        c, p = w.config, "model.vision_model."
        self.places = places.Idefics(c)
        self._device, self._dtype = w.device, w.dtype
        vision = c.part("vision_config")
        vision.defaults(**USUAL)
        self.hidden = vision.integer("embed_dim")
        vision.defaults(hidden_size=self.hidden)
        last = vision.integer("num_hidden_layers")
        self._tower = Encoder(w, vision, p, wanted=[last], classed=True, act="gelu", eps=EPS)
        self._resample = perceiver(w, self.hidden) if c.flag("use_resampler", False) else None

    def __call__(self, image: Image) -> torch.Tensor:
        self.places.count(image)
        pixels = torch.from_numpy(values(image, PIXELS, 3)[None]).to(self._device, self._dtype)
        seen = self._tower(pixels)[0]
        return seen[0] if self._resample is None else self._resample(seen)

    def largest(self) -> Image:
        return Image.of({PIXELS: np.zeros((3, self.places.size, self.places.size), np.float32)})


def perceiver(w: "Checkpoint", hidden: int) -> Perceiver:
    c, p = w.config.part("perceiver_config"), "model.perceiver_resampler"
    count = c.integer("resampler_n_heads", 16)
    heads = cut_heads(w, count, count, c.integer("resampler_head_dim", 96))

    def norm(name: str, size: int = hidden) -> LayerNorm:
        return layer_norm(w, f"{p}.{name}", size, EPS)

    def layer(n: int) -> PerceiverLayer:
        own, mlp = f"blocks.{n}.0", f"{p}.blocks.{n}.1"
        names = [f"{p}.{own}.{name}_proj" for name in ("q", "k", "v", "output")]
        both = None
        if c.flag("qk_layer_norms_perceiver", False):
            size = heads.head_dim
            both = norm(f"{own}.q_layer_norm", size), norm(f"{own}.k_layer_norm", size)
        return PerceiverLayer(
            w,
            heads,
            hidden,
            names,
            (norm(f"{own}.latents_layer_norm"), norm(f"{own}.context_layer_norm")),
            norm(f"blocks.{n}.1.ln"),
            MLP(w, f"{mlp}.fc", f"{mlp}.c_proj", hidden=hidden, inner=4 * hidden, act="relu",
                bias=False),
            both,
        )  # fmt: skip

    latents = w.read(f"{p}.latents", (c.integer("resampler_n_latents", 64), hidden))
    layers = [layer(n) for n in range(c.integer("resampler_depth", 6))]
    return Perceiver(latents, layers, norm("layer_norm"))
