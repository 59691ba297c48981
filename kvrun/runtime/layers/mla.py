"""MLA: keys and values of all heads made from one narrow latent per token."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvrun.errors import Unsupported
from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.layers.linear import Linear, split_cols, split_rows
from kvrun.runtime.layers.norm import before_product, rms_norm
from kvrun.runtime.layers.qkv import Shard

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.checkpoint import Checkpoint
    from kvrun.runtime.layers.norm import Norm
    from kvrun.runtime.layers.position import Rope

_EPS = 1e-6  # of the norms of latents, whatever the model's own is


class MLA:
    """Multi-head latent attention (DeepSeek-V2, 2024), under the names of its files.

    x [tokens, hidden] -> [tokens, hidden], plus `add` if given; `norm` is applied to x first. The
    cache holds every head's keys and values, not the latent; values are padded to the keys' width.
    """

    def __init__(
        self, w: "Checkpoint", layer: int, name: str, *, rope: "Rope", scale: float
    ) -> None:
        c = w.config
        heads, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
        self._nope, self._rotated = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
        self._value, self._rank = c.integer("v_head_dim"), c.integer("kv_lora_rank")
        size = self._nope + self._rotated
        if self._value > size:
            raise Unsupported(f"heads whose values ({self._value}) are wider than keys ({size}).")
        first, last = w.group.cut(heads, "attention heads")
        self.spec = AttentionSpec(layer, last - first, last - first, size, scale)
        self._rope = rope
        bias = c.flag("attention_bias", False)
        narrow = c.get("q_lora_rank")
        self._q_a = None
        if narrow is not None:
            self._q_a = Linear(w, Shard(f"{name}.q_a_proj", narrow, hidden), bias=bias)
            self._q_norm = rms_norm(w, f"{name}.q_a_layernorm", narrow, _EPS)
        q, width = (f"{name}.q_proj", hidden) if narrow is None else (f"{name}.q_b_proj", narrow)
        self._q = Linear(w, split_rows(w, q, heads * size, width))
        latent = Shard(f"{name}.kv_a_proj_with_mqa", self._rank + self._rotated, hidden)
        self._kv_a = Linear(w, latent, bias=bias)
        self._kv_norm = rms_norm(w, f"{name}.kv_a_layernorm", self._rank, _EPS)
        rows = heads * (self._nope + self._value)
        self._kv = Linear(w, split_rows(w, f"{name}.kv_b_proj", rows, self._rank))
        out = split_cols(w, f"{name}.o_proj", hidden, heads * self._value)
        self._out = Linear(w, out, bias=bias)

    def __call__(
        self,
        x: torch.Tensor,
        batch: "Batch",
        add: torch.Tensor | None = None,
        norm: "Norm | None" = None,
    ) -> torch.Tensor:
        spec, nope = self.spec, self._nope
        x, before = before_product(norm, x)
        if self._q_a is None:
            q = self._q(x, batch, before=before)
        else:
            q = self._q(self._q_a(x, batch, before=before), batch, before=self._q_norm)
        q = q.view(-1, spec.heads, spec.head_dim)
        both = self._kv_a(x, batch, before=before)
        latent, shared = both[:, : self._rank], both[:, self._rank :].unsqueeze(1)
        self._rope(q[..., nope:], batch)
        self._rope(shared, batch)
        kv = self._kv(latent.contiguous(), batch, before=self._kv_norm)
        kv = kv.view(-1, spec.heads, nope + self._value)
        k = torch.cat((kv[..., :nope], shared.expand(-1, spec.heads, -1)), 2)
        v = F.pad(kv[..., nope:], (0, spec.head_dim - self._value))
        batch.backend.cache.store(spec.layer, batch.slot_mapping, torch.cat((k, v), 1))
        y = batch.backend.attend(spec, q, k, v, batch).view(-1, spec.heads, spec.head_dim)
        return self._out(y[..., : self._value].reshape(len(x), -1), batch, add)
