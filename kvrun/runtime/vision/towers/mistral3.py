"""Mistral Small 3.1 and later: Pixtral's tower of any size, squares of patches merged to one.
Source: transformers, models/pixtral/modeling_pixtral.py, models/mistral3/modeling_mistral3.py."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from kvrun.runtime.image import Image
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.linear import Linear
from kvrun.runtime.layers.mlp import GatedMLP
from kvrun.runtime.layers.norm import rms_norm
from kvrun.runtime.layers.qkv import Shard
from kvrun.runtime.text import places
from kvrun.runtime.text.places import PIXELS, SIZES
from kvrun.runtime.vision.encoder import FullAttention, Patches, Projector, values

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.hf_config import HFConfig

USUAL = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 1540,
    "patch_size": 14,
}
EPS = 1e-5  # of all norms of the tower


def build(w: "Checkpoint") -> "Mistral3":
    return Mistral3(w)


class Mistral3:
    """Tower, norm, merged squares of patches, MLP: rows of features as the image has them."""

    def __init__(self, w: "Checkpoint") -> None:
        c = w.config
        self.places = places.Mistral3(c)
        self._device, self._dtype = w.device, w.dtype
        vision = c.part("vision_config")
        vision.defaults(**USUAL)
        tower = w.prefix("patch_conv.weight", "vision_tower.", "model.vision_tower.")
        self._tower = Pixtral(w, vision, tower)
        self._largest = vision.integer("image_size")
        wide, area = self._tower.hidden, self.places.merge**2
        own = w.prefix("norm.weight", "multi_modal_projector.", "model.multi_modal_projector.")
        self._norm = rms_norm(w, f"{own}norm", wide, c.number("rms_norm_eps", 1e-5))
        self._merge = Linear(w, Shard(f"{own}patch_merger.merging_layer", wide, wide * area))
        self.hidden = c.integer("hidden_size", 5120)
        bias = c.flag("multimodal_projector_bias", False)
        act = c.text("projector_hidden_act", "gelu")
        self._project = Projector(w, own, wide, self.hidden, act, bias=bias)

    def __call__(self, image: Image) -> torch.Tensor:
        rows, columns = self.places.grid(image)
        merge, size = self.places.merge, self.places.patch
        high, wide = rows * merge, columns * merge
        pixels = values(image, PIXELS, 3)[:, : high * size, : wide * size].copy()
        x = self._norm(self._tower(torch.from_numpy(pixels).to(self._device, self._dtype)))
        # Squares as unfold has them: each value of all patches of a square, row by row.
        x = x.view(rows, merge, columns, merge, -1).permute(0, 2, 4, 1, 3)
        batch: Any = Patches(1)
        return self._project(self._merge(x.reshape(rows * columns, -1), batch))

    def largest(self) -> Image:
        square = self.places.patch * self.places.merge
        side = max(1, self._largest // square) * square
        pixels = np.zeros((3, side, side), np.float32)
        return Image.of({PIXELS: pixels, SIZES: np.array([side, side])})


class Pixtral:
    """pixels [3, height, width] -> the last layer's states [patches, hidden]."""

    def __init__(self, w: "Checkpoint", c: "HFConfig", p: str) -> None:
        self.hidden, self._patch = c.integer("hidden_size"), c.integer("patch_size")
        shape = (self.hidden, c.integer("num_channels", 3), self._patch, self._patch)
        self._conv = w.read(f"{p}patch_conv.weight", shape)
        self._before = rms_norm(w, f"{p}ln_pre", self.hidden, EPS)
        dim = self.hidden // c.integer("num_attention_heads")
        steps = torch.arange(0, dim, 2, dtype=torch.float32, device=w.device) / dim
        self._frequencies = c.rope().number("rope_theta") ** -steps
        self._blocks = [
            self._block(w, c, f"{p}transformer.layers.{n}")
            for n in range(c.integer("num_hidden_layers"))
        ]

    def _block(self, w: "Checkpoint", c: "HFConfig", p: str) -> Block:
        size, inner = self.hidden, c.integer("intermediate_size")
        names = [f"{p}.attention.{x}_proj" for x in ("q", "k", "v", "o")]
        heads = c.integer("num_attention_heads")
        attention: Any = FullAttention(w, heads, size, names, bias=False)
        gate_up = [f"{p}.feed_forward.gate_proj", f"{p}.feed_forward.up_proj"]
        down, act = f"{p}.feed_forward.down_proj", c.text("hidden_act", "gelu")
        return Block(
            rms_norm(w, f"{p}.attention_norm", size, EPS),
            attention,
            rms_norm(w, f"{p}.ffn_norm", size, EPS),
            GatedMLP(w, gate_up, down, hidden=size, inner=inner, act=act),
        )

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        grid = F.conv2d(pixels[None], self._conv, stride=self._patch)[0]
        x = self._before(grid.flatten(1).t().contiguous())
        batch: Any = Patches(1, rotation=self._rotation(grid.shape[1], grid.shape[2], x.dtype))
        for block in self._blocks:
            x = block(x, batch)
        return x

    def _rotation(
        self, rows: int, columns: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Even frequencies turn by the row, odd ones by the column."""
        device = self._frequencies.device
        row = torch.arange(rows, device=device).repeat_interleave(columns)[:, None]
        column = torch.arange(columns, device=device).repeat(rows)[:, None]
        angles = torch.cat((row * self._frequencies[0::2], column * self._frequencies[1::2]), 1)
        angles = torch.cat((angles, angles), 1)
        return angles.cos().to(dtype), angles.sin().to(dtype)
