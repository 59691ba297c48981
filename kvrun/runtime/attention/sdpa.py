"""Attention on torch's scaled_dot_product_attention: pages are gathered, then attended densely."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.attention._groups import Group, Plan, make_plan
from kvrun.runtime.cache.tensors import KVCache
from kvrun.runtime.device import native
from kvrun.runtime.kernels.rotary import Rotation

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch

# Scores held at once by the path that needs them in memory.
_SCORES = 1 << 25


class Attention:
    """Runs wherever torch runs; written for CPU.

    A step's sequences are put into a few groups of similar lengths, and a group's keys and values
    are gathered into one padded tensor [sequences, kv_heads, keys, head_dim].
    """

    def __init__(self, cache: KVCache, dtype: torch.dtype) -> None:
        self.cache = cache
        self._dtype = dtype
        self._native = native("one_query") if cache.device.type == "cpu" else None

    @staticmethod
    def reject(spec: AttentionSpec, device: torch.device) -> str | None:
        return None

    def plan(self, batch: "Batch") -> None:
        batch.plan = make_plan(batch, self._dtype)

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: "Batch",
    ) -> torch.Tensor:
        plan: Plan = batch.plan
        if plan.whole is not None:
            return self._group(spec, q, plan.whole)
        out = q.new_empty((len(q), spec.out))
        for group in plan.groups:
            y = self._group(spec, q.index_select(0, group.rows), group)
            if group.kept is not None:
                y = y.index_select(0, group.kept)
            out.index_copy_(0, group.targets, y)
        return out

    def attend_new(
        self, spec: AttentionSpec, qkv: torch.Tensor, rotation: Rotation, batch: "Batch"
    ) -> torch.Tensor | None:
        return None

    def _group(self, spec: AttentionSpec, q: torch.Tensor, group: Group) -> torch.Tensor:
        """q [sequences * queries, heads, head_dim] -> [sequences * queries, out]"""
        mask = group.mask(spec)
        if mask is None and group.queries == 1 and group.first_block is not None:
            y = self._alone(spec, q, group.first_block * self.cache.block_size, group.keys)
            if y is not None:
                return y
        k, v = group.gather(self.cache, spec)
        if spec.softcap is not None or spec.sinks is not None or spec.latent is not None:
            return _scored(spec, q, k, v, mask, group)
        share = spec.heads // spec.kv_heads
        few = group.size == 1 or q.dtype is not torch.float32
        if group.queries == 1 and share > 1 and few:
            # One query row per head makes kernels slow: the heads that share keys become the rows
            # of one product. In fp32 eight sequences take 0.7 of that time as they are.
            q = q.view(group.size, spec.kv_heads, share, spec.head_dim)
            if mask is not None and mask.shape[1] > 1:
                mask = mask.view(group.size, spec.kv_heads, share, -1)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=spec.scale)
            return y.reshape(group.size, -1)
        q = q.view(group.size, group.queries, spec.heads, spec.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=spec.causal and mask is None and group.queries > 1,
            scale=spec.scale,
            enable_gqa=share > 1,
        )
        return y.transpose(1, 2).reshape(len(y) * group.queries, -1)

    def _alone(
        self, spec: AttentionSpec, q: torch.Tensor, first: int, count: int
    ) -> torch.Tensor | None:
        """One query over all of its keys, which lie in one stretch, by the kernel in C."""
        rows = self.cache.rows(spec.layer)
        plain = spec.softcap is None and spec.sinks is None and spec.latent is None
        if self._native is None or not plain or rows.dtype is not q.dtype or not q.is_contiguous():
            return None
        if not self._native.takes(spec.heads, spec.kv_heads, spec.head_dim, q.dtype):
            return None
        y: torch.Tensor = self._native.attend(
            q, rows[first : first + count], spec.kv_heads, spec.scale
        )
        return y


def _scored(
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    group: Group,
) -> torch.Tensor:
    """Attention with the scores in memory, for what the fused kernel does not know."""
    share = spec.heads // spec.kv_heads
    queries = q.view(group.size, group.queries, spec.kv_heads, share, spec.head_dim)
    if spec.causal and mask is None and group.queries > 1:
        mask = group.causal_mask()
    out = q.new_empty((*queries.shape[:4], v.shape[3]))
    step = max(1, _SCORES // (group.size * spec.heads * k.shape[2]))
    for start in range(0, group.queries, step):
        part = queries[:, start : start + step]
        rows = part.shape[1]
        folded = part.permute(0, 2, 3, 1, 4).reshape(group.size, spec.kv_heads, share * rows, -1)
        scores = (folded @ k.transpose(2, 3)).float().mul_(spec.scale)
        if spec.softcap is not None:
            scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
        scores = scores.view(group.size, spec.heads, rows, -1)
        if mask is not None:
            scores += mask[:, :, start : start + step]
        weights = scores.softmax(-1)
        if spec.sinks is not None:
            # A sink is one more logit whose value is dropped: it only adds to the divisor.
            lse = scores.logsumexp(-1, keepdim=True)
            weights *= torch.sigmoid(lse - spec.sinks.view(-1, 1, 1))
        weights = weights.to(v.dtype).view(group.size, spec.kv_heads, share * rows, -1)
        y = (weights @ v).view(group.size, spec.kv_heads, share, rows, -1)
        out[:, start : start + step] = y.permute(0, 3, 1, 2, 4)
    return out.view(group.size * group.queries, -1)
