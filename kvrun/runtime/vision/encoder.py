"""Encoder: patches -> features. Ordinary blocks whose attention sees everything of an image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from kvrun.errors import Unsupported
from kvrun.runtime.image import Image
from kvrun.runtime.layers.block import Block
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.layers.mlp import MLP, activation
from kvrun.runtime.layers.norm import Norm, before_product, layer_norm
from kvrun.runtime.layers.qkv import Shard, cut_heads, separate

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.hf_config import HFConfig


@dataclass
class Patches:
    """What blocks are handed in the place of a Batch: `count` images of as many patches each.

    `mask` [count, 1, 1, patches] is false for what nobody sees; None: all is seen.
    """

    count: int
    mask: torch.Tensor | None = None
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None  # cos, sin [patches, head_dim]
    lora: None = None  # adapters change the text part only


class FullAttention:
    """x [images * patches, hidden] -> the same, plus `add` if given; `norm` goes before x."""

    def __init__(
        self, w: "Checkpoint", heads: int, hidden: int, names: Sequence[str], *, bias: bool = True
    ) -> None:
        """`names` of the matrices of queries, keys, values and the way back."""
        if hidden % heads:
            raise Unsupported(f"{heads} heads of a tower do not divide {hidden} values.")
        self._heads = cut_heads(w, heads, heads, hidden // heads)
        q, k, v, out = names
        self._qkv = Linear(w, *separate(self._heads, hidden, q, k, v), bias=bias)
        self._out = Linear(w, split_cols(w, out, hidden, hidden), bias=bias)

    def __call__(
        self,
        x: torch.Tensor,
        batch: Any,
        add: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        x, before = before_product(norm, x)
        h, patches = self._heads, len(x) // batch.count
        y = self._qkv(x, batch, before=before).view(batch.count, patches, 3, h.count, h.head_dim)
        q, k, v = y.permute(2, 0, 3, 1, 4).unbind(0)
        if batch.rotation is not None:
            q, k = _rotated(q, *batch.rotation), _rotated(k, *batch.rotation)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask)
        return self._out(seen.transpose(1, 2).reshape(len(x), -1), batch, add)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Encoder:
    """CLIP's and SigLIP's vision transformer. Source: transformers, models/clip/modeling_clip.py.

    `config` is that of the tower, `prefix` stands before its tensors' names. `wanted` are the
    layers whose states are given, 0 for what the first one gets, negative ones from the end;
    layers behind the last of them are not read. `classed`: CLIP's token before the patches and
    norm before the layers, and no bias of the patches.
    """

    def __init__(
        self,
        w: "Checkpoint",
        config: "HFConfig",
        prefix: str,
        *,
        wanted: Sequence[int],
        classed: bool,
        act: str,
        eps: float,
    ) -> None:
        c, p = config, prefix
        layers, self.hidden = c.integer("num_hidden_layers"), c.integer("hidden_size")
        self.patch = c.integer("patch_size")
        shape = (self.hidden, c.integer("num_channels", 3), self.patch, self.patch)
        self._patch = w.read(f"{p}embeddings.patch_embedding.weight", shape)
        bias = None if classed else f"{p}embeddings.patch_embedding.bias"
        self._bias = None if bias is None else w.read(bias, (self.hidden,))
        self.side = c.integer("image_size") // self.patch
        rows = self.side**2 + classed
        self._places = w.read(f"{p}embeddings.position_embedding.weight", (rows, self.hidden))
        eps = c.number("layer_norm_eps", eps)
        self._class = self._before = None
        if classed:
            self._class = w.read(f"{p}embeddings.class_embedding", (self.hidden,))
            self._before = layer_norm(w, f"{p}pre_layrnorm", self.hidden, eps)
        self._wanted = [n if n >= 0 else layers + 1 + n for n in wanted]
        if not all(0 <= n <= layers for n in self._wanted):
            raise Unsupported(f"layer {wanted} of a tower of {layers} is not there.")
        act = c.text("hidden_act", act)
        self._blocks = [self._block(w, c, f"{p}encoder.layers.{n}", act, eps)
                        for n in range(max(self._wanted))]  # fmt: skip
        unread = [f"{p}encoder.layers.{n}." for n in range(max(self._wanted), layers)]
        w.skip(*unread, f"{p}post_layernorm.", f"{p}embeddings.position_ids", f"{p}head.")

    def _block(self, w: "Checkpoint", c: "HFConfig", p: str, act: str, eps: float) -> Block:
        size, inner = self.hidden, c.integer("intermediate_size")
        names = [f"{p}.self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
        attention: Any = FullAttention(w, c.integer("num_attention_heads"), size, names)
        return Block(
            layer_norm(w, f"{p}.layer_norm1", size, eps),
            attention,
            layer_norm(w, f"{p}.layer_norm2", size, eps),
            MLP(w, f"{p}.mlp.fc1", f"{p}.mlp.fc2", hidden=size, inner=inner, act=act),
        )

    def __call__(
        self,
        pixels: torch.Tensor,
        places: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """States [images, tokens, hidden] of the wanted layers, of pixels [images, 3, high, wide].

        `places` [images, patches] are rows of the table of positions, `mask` [images, patches]
        says which patches there are; without them images fill the table.
        """
        x = F.conv2d(pixels, self._patch, self._bias, stride=self.patch)
        x = x.flatten(2).transpose(1, 2).contiguous()  # kernels take rows
        if self._class is not None:
            x = torch.cat((self._class.expand(len(x), 1, -1), x), dim=1)
        x = x + (self._places if places is None else F.embedding(places, self._places))
        if self._before is not None:
            x = self._before(x)
        images, tokens, _ = x.shape
        batch: Any = Patches(images, None if mask is None else mask[:, None, None, :])
        x = x.reshape(images * tokens, -1)
        states = {0: x.clone()} if 0 in self._wanted else {}
        for n, block in enumerate(self._blocks, 1):
            x = block(x, batch)
            if n in self._wanted:
                states[n] = x.clone()  # the next block may write over it
        return [states[n].view(images, tokens, -1) for n in self._wanted]


class Projector:
    """act(x · first) · second, both with a bias unless `bias` is false.

    x [rows, wide] -> [rows, hidden]
    """

    def __init__(
        self, w: "Checkpoint", prefix: str, wide: int, hidden: int, act: str, *, bias: bool
    ) -> None:
        self._first = Linear(w, Shard(f"{prefix}linear_1", hidden, wide), bias=bias)
        self._second = Linear(w, Shard(f"{prefix}linear_2", hidden, hidden), bias=bias)
        self._act = activation(act)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        batch: Any = Patches(1)
        return self._second(self._act(self._first(x, batch)), batch)


def values(image: Image, name: str, dims: int) -> np.ndarray:
    """An array of an image. Raises InvalidRequest as `Image.shape` does."""
    shape = image.shape(name, dims)
    array = image.arrays[name]
    # A copy: torch does not take what is read-only.
    return np.frombuffer(array.data, array.dtype).reshape(shape).copy()
