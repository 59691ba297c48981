"""Attention by kvrun's own kernels: block tables and lengths are read on the device."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.cache.tensors import KVCache
from kvrun.runtime.device import kernel
from kvrun.runtime.kernels import latent_attention
from kvrun.runtime.kernels.paged_attention import Options
from kvrun.runtime.kernels.rotary import Rotation

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch

HEAD_DIMS = (16, 256)
LATENT, ROTATED = 512, 128  # columns at most


@dataclass(frozen=True)
class Plan:
    """The first `decodes` sequences have one query; `fresh`: the others have nothing cached."""

    decodes: int
    longest: int  # queries of one sequence among the others
    fresh: bool
    cu_seqlens: torch.Tensor  # of the others, from 0
    context_lens: torch.Tensor
    block_tables: torch.Tensor


class Attention:
    """Split over keys for single queries, over queries for prompts; nothing is planned ahead."""

    def __init__(self, cache: KVCache, dtype: torch.dtype) -> None:
        self.cache = cache
        self._kernel = kernel("paged_attention", cache.device)
        self._latent = kernel("latent_attention", cache.device)
        self._options: dict[AttentionSpec, Options] = {}
        self._latents: dict[AttentionSpec, latent_attention.Options] = {}

    @staticmethod
    def reject(spec: AttentionSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernels need a CUDA device"
        if spec.latent is not None:
            if spec.latent > LATENT or spec.head_dim - spec.latent > ROTATED:
                return f"a latent of {spec.latent} and {spec.head_dim - spec.latent} is too wide"
            options = (spec.window, spec.chunk, spec.softcap, spec.alibi, spec.sinks)
            if any(option is not None for option in options):
                return "its kernel of latents sees all keys, as they are"
            return None
        if not HEAD_DIMS[0] <= spec.head_dim <= HEAD_DIMS[1]:
            low, high = HEAD_DIMS
            return f"a head of {spec.head_dim} dimensions is not between {low} and {high}"
        if spec.relative is not None:
            return "its kernels know no learned bias of distances"
        return None

    def plan(self, batch: "Batch") -> None:
        queries, contexts = batch.query_lens_host, batch.context_lens_host
        decodes = next((i for i, n in enumerate(queries) if n > 1), len(queries))
        others = queries[decodes:]
        starts = batch.cu_seqlens[decodes:].int()
        batch.plan = Plan(
            decodes,
            max(others, default=0),
            others == contexts[decodes:],
            starts - decodes if decodes and others else starts,
            batch.context_lens.int(),
            batch.block_tables.int(),
        )

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: "Batch",
    ) -> torch.Tensor:
        plan: Plan = batch.plan
        if spec.latent is not None:
            return self._attend_latent(spec, q, plan)
        ones, cache = plan.decodes, self.cache.rows(spec.layer)
        options = self._options_of(spec)
        tables, lengths = plan.block_tables, plan.context_lens
        if ones == len(lengths):
            return self._decode(q, cache, tables, lengths, options)
        out = q.new_empty((len(q), spec.heads * spec.head_dim))
        if ones:
            self._decode(q[:ones], cache, tables[:ones], lengths[:ones], options, out=out[:ones])
        self._kernel.prefill(
            q[ones:], k[ones:], v[ones:], cache, tables[ones:], plan.cu_seqlens, lengths[ones:],
            options, max_query_len=plan.longest, fresh=plan.fresh and spec.causal, out=out[ones:],
        )  # fmt: skip
        return out

    def attend_new(
        self, spec: AttentionSpec, qkv: torch.Tensor, rotation: Rotation, batch: "Batch"
    ) -> torch.Tensor | None:
        plan: Plan = batch.plan
        if spec.latent is not None or plan.decodes < len(plan.context_lens):
            return None
        # Behind kernels of adapters it reads nothing early: 16.4 us a layer of the 8B shape at 8
        # sequences on an H100, where it takes 11.9 behind a product.
        if batch.lora is not None or not self._kernel.appends(qkv):
            return None
        # Where no angles were computed, none of this step's kernels in front need have waited for
        # what this one reads before it waits.
        if rotation.cos is None:
            return None
        y: torch.Tensor = self._kernel.append_and_decode(
            qkv, rotation, batch.slot_mapping, self.cache.rows(spec.layer), plan.block_tables,
            plan.context_lens, self._options_of(spec),
        )  # fmt: skip
        return y

    def _attend_latent(self, spec: AttentionSpec, q: torch.Tensor, plan: Plan) -> torch.Tensor:
        if spec not in self._latents:
            assert spec.latent is not None
            self._latents[spec] = latent_attention.Options(
                self.cache.block_size, spec.latent, spec.scale
            )
        options, ones, cache = self._latents[spec], plan.decodes, self.cache.rows(spec.layer)
        tables, lengths = plan.block_tables, plan.context_lens
        out = q.new_empty((len(q), spec.out))
        if ones:
            self._latent.decode(q[:ones], cache, tables[:ones], lengths[:ones], options,
                                out=out[:ones])  # fmt: skip
        if ones < len(lengths):
            self._latent.prefill(q[ones:], cache, tables[ones:], plan.cu_seqlens, lengths[ones:],
                                 options, out=out[ones:])  # fmt: skip
        return out

    def _decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        y: torch.Tensor = self._kernel.decode(*args, **kwargs)
        return y

    def _options_of(self, spec: AttentionSpec) -> Options:
        if spec not in self._options:
            self._options[spec] = Options(
                block_size=self.cache.block_size,
                kv_heads=spec.kv_heads,
                head_dim=spec.head_dim,
                scale=spec.scale,
                window=spec.window,
                chunk=spec.chunk,
                softcap=spec.softcap,
                alibi=spec.alibi,
                sinks=spec.sinks,
                causal=spec.causal,
            )
        return self._options[spec]
