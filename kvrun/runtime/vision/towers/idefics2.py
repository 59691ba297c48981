"""Idefics2: SigLIP for any aspect ratio, then a perceiver that asks what it has seen.
Source: transformers, models/idefics2/modeling_idefics2.py."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kvrun.runtime.image import Image
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.layers.mlp import Gate, GatedMLP, gate_and_up
from kvrun.runtime.layers.norm import RMSNorm, layer_norm, rms_norm
from kvrun.runtime.layers.qkv import cut_heads
from kvrun.runtime.text import places
from kvrun.runtime.text.places import MASK, PIXELS
from kvrun.runtime.vision.encoder import Encoder, Patches, values
from kvrun.runtime.vision.perceiver import Perceiver, PerceiverLayer

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.hf_config import HFConfig

USUAL = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
LONGEST = 980  # pixels of a side, as its processor makes them
PARTS = 5  # four quarters and the whole


def build(w: "Checkpoint") -> "Idefics2":
    return Idefics2(w)


class Idefics2:
    """Patches that are there -> tower, norm, gated projection, latents."""

    def __init__(self, w: "Checkpoint") -> None:
        c = w.config
        self.places = places.Idefics2(c)
        self._device, self._dtype = w.device, w.dtype
        vision = c.part("vision_config")
        vision.defaults(**USUAL)
        eps = vision.number("layer_norm_eps", 1e-6)
        first = "embeddings.patch_embedding.weight"
        p = w.prefix(first, "model.vision_model.", "vision_model.")
        last = vision.integer("num_hidden_layers")
        self._tower = Encoder(
            w, vision, p, wanted=[last], classed=False, act="gelu_pytorch_tanh", eps=eps
        )
        wide = self._tower.hidden
        self._norm = layer_norm(w, f"{p}post_layernorm", wide, eps)
        p = w.prefix("perceiver_resampler.latents", "model.connector.", "connector.")
        self.hidden = hidden = c.integer("hidden_size", 4096)
        inner = c.integer("intermediate_size", 14336)
        own = f"{p}modality_projection."
        gate_up = gate_and_up(w, [f"{own}gate_proj", f"{own}up_proj"], wide, inner)
        self._gate_up = Linear(w, *gate_up)
        self._gate = Gate(c.text("hidden_act", "silu"), w.device)
        self._down = Linear(w, split_cols(w, f"{own}down_proj", hidden, inner))
        self._resample = perceiver(w, c.part("perceiver_config"), f"{p}perceiver_resampler.")

    def __call__(self, image: Image) -> torch.Tensor:
        self.places.count(image)
        pixels = torch.from_numpy(values(image, PIXELS, 4)).to(self._device, self._dtype)
        at, there = self._patches(values(image, MASK, 3))
        at, mask = at.to(self._device), there.to(self._device)
        x = self._norm(self._tower(pixels, at, mask)[0])
        batch: Any = Patches(1)
        y = self._gate_up(x.flatten(0, 1), batch)
        y = self._down(y, batch, before=self._gate)
        return self._resample(y.view(*x.shape[:2], -1), mask)

    def _patches(self, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in the table of positions, and which patches are wholly there, of images with
        pixels in the left upper corner of mask [images, height, width]; both [images, patches].

        An image of any size is spread over the whole table.
        """
        size, side = self.places.patch, self._tower.side
        parts, high, wide = mask.shape[0], mask.shape[1] // size, mask.shape[2] // size
        cells = mask[:, : high * size, : wide * size].reshape(parts, high, size, wide, size)
        there = torch.from_numpy(cells.all(axis=(2, 4)))
        # In the operators of the model's makers: places that fall on a border must fall the same
        # way. NaviT's fractions: https://arxiv.org/abs/2307.06304
        borders = torch.arange(1 / side, 1.0, 1 / side)

        def buckets(present: torch.Tensor) -> torch.Tensor:
            place = torch.arange(present.shape[1], dtype=torch.float32) * (
                1.0 / present.sum(1, keepdim=True)
            )
            return torch.bucketize(place.clamp(max=1.0 - 1e-6), borders, right=True)

        rows, columns = buckets(there[:, :, 0]), buckets(there[:, 0, :])
        at = (rows[:, :, None] * side + columns[:, None, :]).where(there, torch.tensor(0))
        return at.flatten(1), there.flatten(1)

    def largest(self) -> Image:
        pixels = np.zeros((PARTS, 3, LONGEST, LONGEST), np.float32)
        return Image.of({PIXELS: pixels, MASK: np.ones((PARTS, LONGEST, LONGEST), np.uint8)})


def perceiver(w: "Checkpoint", c: "HFConfig", p: str) -> Perceiver:
    hidden, eps = c.integer("hidden_size", 4096), c.number("rms_norm_eps", 1e-6)
    count, kv = c.integer("resampler_n_heads", 16), c.integer("num_key_value_heads", 4)
    heads = cut_heads(w, count, kv, c.integer("resampler_head_dim", 96))
    act = c.text("hidden_act", "silu")

    def norm(name: str) -> RMSNorm:
        return rms_norm(w, p + name, hidden, eps)

    def layer(own: str) -> PerceiverLayer:
        names = [f"{p}{own}.self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
        mlp = f"{p}{own}.mlp"
        return PerceiverLayer(
            w,
            heads,
            hidden,
            names,
            (norm(f"{own}.input_latents_norm"), norm(f"{own}.input_context_norm")),
            norm(f"{own}.post_attention_layernorm"),
            GatedMLP(w, (f"{mlp}.gate_proj", f"{mlp}.up_proj"), f"{mlp}.down_proj",
                     hidden=hidden, inner=4 * hidden, act=act),
        )  # fmt: skip

    latents = w.read(f"{p}latents", (c.integer("resampler_n_latents", 64), hidden))
    layers = [layer(f"layers.{n}") for n in range(c.integer("resampler_depth", 3))]
    return Perceiver(latents, layers, norm("norm"))
