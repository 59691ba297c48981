"""Perceiver: a fixed number of latents ask what a tower has seen of an image."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from kvrun.runtime.layers.block import Part
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.layers.norm import Norm
from kvrun.runtime.layers.qkv import Heads, Shard
from kvrun.runtime.vision.encoder import Patches

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


class Perceiver:
    """context [images, patches, hidden], mask [images, patches] -> [images * latents, hidden]

    `mask` says which patches there are; None: all. `latents` [latents, hidden].
    """

    def __init__(
        self, latents: torch.Tensor, layers: "Sequence[PerceiverLayer]", norm: Norm
    ) -> None:
        self._latents = latents
        self._layers = layers
        self._norm = norm

    def __call__(self, context: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        images, count = len(context), len(self._latents)
        seen = None if mask is None else F.pad(mask, (0, count), value=True)[:, None, None, :]
        batch: Any = Patches(images, seen)
        x = self._latents.repeat(images, 1)
        for layer in self._layers:
            x = layer(x, context, batch)
        return self._norm(x)


class PerceiverLayer:
    """x + attention(norm(x), [norm(context); norm(x)]), then x + mlp(norm(x)).

    `names` of the matrices of queries, keys, values and the way back; `norms` of latents and of the
    context. `head_norms` go over each head of queries, and of keys.
    """

    def __init__(
        self,
        w: "Checkpoint",
        heads: Heads,
        hidden: int,
        names: Sequence[str],
        norms: tuple[Norm, Norm],
        mlp_norm: Norm,
        mlp: Part,
        head_norms: tuple[Norm, Norm] | None = None,
    ) -> None:
        h = self._heads = heads
        size, size_kv = h.heads * h.head_dim, h.kv_heads * h.head_dim
        q, k, v, out = names
        self._q = Linear(w, Shard(q, size, hidden, rows=h.scaled(h.mine)))
        self._kv = Linear(
            w, *(Shard(name, size_kv, hidden, rows=h.scaled(h.mine_kv)) for name in (k, v))
        )
        self._out = Linear(w, split_cols(w, out, hidden, size))
        self._latents_norm, self._context_norm = norms
        self._mlp_norm, self._mlp = mlp_norm, mlp
        self._head_norms = head_norms

    def __call__(self, x: torch.Tensor, context: torch.Tensor, batch: Any) -> torch.Tensor:
        h, images = self._heads, batch.count
        latents = self._latents_norm(x)
        # Kernels norm rows, of two dimensions.
        seen = self._context_norm(context.flatten(0, 1)).view_as(context)
        whole = torch.cat((seen, latents.view(images, -1, x.shape[-1])), 1)
        q = self._q(latents, batch).view(images, -1, h.count, h.head_dim).transpose(1, 2)
        kv = self._kv(whole.flatten(0, 1), batch).view(images, -1, 2, h.kv_count, h.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        if self._head_norms is not None:
            q, k = (norm(x) for norm, x in zip(self._head_norms, (q, k), strict=True))
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask, enable_gqa=True)
        x = self._out(seen.transpose(1, 2).reshape(len(x), -1), batch, x)
        return self._mlp(x, batch, add=x, norm=self._mlp_norm)
