"""MLA: keys and values of all heads made from one narrow latent per token."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvrun.errors import Unsupported
from kvrun.runtime import quant
from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.checkpoint import Product
from kvrun.runtime.layers.linear import Linear, split_cols, split_rows
from kvrun.runtime.layers.norm import before_product, rms_norm
from kvrun.runtime.layers.qkv import Shard
from kvrun.runtime.lora.settle import Matrix

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.layers.norm import Norm
    from kvrun.runtime.layers.position import Rope
    from kvrun.runtime.lora.beyond import Change

_EPS = 1e-6  # of the norms of latents, whatever the model's own is


class MLA:
    """Multi-head latent attention (DeepSeek-V2, 2024), under the names of its files.

    x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first. The
    cache holds a token's latent and the rotated part of its key, both shared by all heads: queries
    are brought into the latent's space, and what attention gives is brought back from it. Where
    somebody looks on at the products (`w.reader`) every head has keys and values of its own, padded
    to one width, so that kv_b is seen at work.
    """

    def __init__(
        self, w: "Checkpoint", layer: int, name: str, *, rope: "Rope", scale: float
    ) -> None:
        c = w.config
        heads, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
        self._nope, self._rotated = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
        self._value, self._rank = c.integer("v_head_dim"), c.integer("kv_lora_rank")
        self._size = self._nope + self._rotated
        if self._value > self._size:
            what = f"heads whose values ({self._value}) are wider than keys ({self._size})."
            raise Unsupported(what)
        first, last = w.group.cut(heads, "attention heads")
        self._heads = last - first
        self._rope = rope
        bias = c.flag("attention_bias", False)
        narrow = c.get("q_lora_rank")
        self._q_a = None
        if narrow is not None:
            self._q_a = Linear(w, Shard(f"{name}.q_a_proj", narrow, hidden), bias=bias)
            self._q_norm = rms_norm(w, f"{name}.q_a_layernorm", narrow, _EPS)
        q, width = (f"{name}.q_proj", hidden) if narrow is None else (f"{name}.q_b_proj", narrow)
        self._q = Linear(w, split_rows(w, q, heads * self._size, width))
        both = Shard(f"{name}.kv_a_proj_with_mqa", self._rank + self._rotated, hidden)
        self._kv_a = Linear(w, both, bias=bias)
        self._kv_norm = rms_norm(w, f"{name}.kv_a_layernorm", self._rank, _EPS)
        rows = heads * (self._nope + self._value)
        shard = split_rows(w, f"{name}.kv_b_proj", rows, self._rank)
        wide, kv_heads, latent = self._size, self._heads, None
        if w.reader is not None:
            self._kv = Linear(w, shard)
        else:
            self._absorbed = Absorbed(w, shard, self._heads, self._nope)
            wide, kv_heads, latent = self._rank + self._rotated, 1, self._rank
        self.spec = AttentionSpec(layer, self._heads, kv_heads, wide, scale, latent=latent)
        out = split_cols(w, f"{name}.o_proj", hidden, heads * self._value)
        self._out = Linear(w, out, bias=bias)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: "Norm | None" = None,
    ) -> torch.Tensor:
        x, before = before_product(norm, x)
        if self._q_a is None:
            q = self._q(x, batch, before=before)
        else:
            q = self._q(self._q_a(x, batch, before=before), batch, before=self._q_norm)
        q = q.view(-1, self._heads, self._size)
        both = self._kv_a(x, batch, before=before)
        self._rope(q[..., self._nope :], batch)
        self._rope(both[:, self._rank :].unsqueeze(1), batch)
        y = (
            self._expanded(q, both, batch)
            if self.spec.latent is None
            else self._in_latent_space(q, both, batch)
        )
        return self._out(y, batch, add)

    def _in_latent_space(self, q: torch.Tensor, both: torch.Tensor, batch: "Batch") -> torch.Tensor:
        """q [tokens, heads, nope + rotated] and both [tokens, latent + rotated] -> [tokens, heads *
        value]"""
        spec, latent = self.spec, both[:, : self._rank]
        latent.copy_(self._kv_norm(latent.contiguous()))
        batch.backend.cache.store(spec.layer, batch.slot_mapping, both)
        wide = q.new_empty((len(q), spec.heads, spec.head_dim))
        wide[..., self._rank :] = q[..., self._nope :]
        self._absorbed.queries(q[..., : self._nope], batch, wide[..., : self._rank])
        keys = both.unsqueeze(1)
        y = batch.backend.attend(spec, wide, keys, keys[..., : self._rank], batch)
        return self._absorbed.values(y.view(-1, spec.heads, self._rank), batch)

    def _expanded(self, q: torch.Tensor, both: torch.Tensor, batch: "Batch") -> torch.Tensor:
        """The same with every head's keys and values in the cache."""
        spec, nope, shared = self.spec, self._nope, both[:, self._rank :].unsqueeze(1)
        kv = self._kv(both[:, : self._rank].contiguous(), batch, before=self._kv_norm)
        kv = kv.view(-1, spec.heads, nope + self._value)
        k = torch.cat((kv[..., :nope], shared.expand(-1, spec.heads, -1)), 2)
        v = F.pad(kv[..., nope:], (0, spec.head_dim - self._value))
        batch.backend.cache.store(spec.layer, batch.slot_mapping, torch.cat((k, v), 1))
        y = batch.backend.attend(spec, q, k, v, batch).view(-1, spec.heads, spec.head_dim)
        return y[..., : self._value].reshape(len(q), -1)


class Absorbed:
    """kv_b, whose rows are `nope` of a head's keys, then its values, as two products by head.

    A stored form of fewer bits becomes a plain matrix. Adapters find it by its name, as they would
    a Linear's, and are applied to both halves.
    """

    def __init__(self, w: "Checkpoint", shard: Shard, heads: int, nope: int) -> None:
        before, rank = w.parameter_bytes, shard.in_features
        eye = torch.eye(rank, dtype=w.dtype, device=w.device)
        matrix = quant.read(w, (shard,), False).matmul(eye).t().contiguous()
        w.settle(before, matrix.nbytes)
        self._site = len(w.products)
        w.products.append(Product((shard,), "by head"))
        self._nope, self._rank, self._matrix = nope, rank, matrix
        by_head = matrix.view(heads, -1, rank)
        self._keys, self._values = by_head[:, :nope], by_head[:, nope:].transpose(1, 2)

    def queries(self, q: torch.Tensor, batch: "Batch", out: torch.Tensor) -> None:
        """q [tokens, heads, nope] · keys, written to out [tokens, heads, rank]."""
        change = self._change(batch)
        if change is not None:
            q = change.by_head(q.clone(), first=0, shifted=False)
        out.copy_(torch.bmm(q.transpose(0, 1), self._keys).transpose(0, 1))
        if batch.lora is not None:
            batch.lora.by_head(self._site, q, out, first=0, back=True)

    def values(self, y: torch.Tensor, batch: "Batch") -> torch.Tensor:
        """y [tokens, heads, rank] · values -> [tokens, heads * value]."""
        out = torch.bmm(y.transpose(0, 1), self._values).transpose(0, 1).contiguous()
        if batch.lora is not None:
            batch.lora.by_head(self._site, y, out, first=self._nope, back=False)
        change = self._change(batch)
        return (out if change is None else change.by_head(out, first=self._nope)).flatten(1)

    def _change(self, batch: "Batch") -> "Change | None":
        """What adapters do to kv_b beyond B · A. A shift of all keys moves no result."""
        extra = None if batch.lora is None else batch.lora.extra
        change = None if extra is None else extra.at(self._site)
        if change is not None:
            change.settle(lambda: Matrix(lambda a, b: self._matrix[:, a:b].t(), self._rank))
        return change
