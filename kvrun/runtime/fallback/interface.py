"""Attention as transformers' code calls it, and where those calls go: a survey, or a batch."""

import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from kvrun.errors import Unsupported
from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.batch import Batch

# What attention may be told beside the mask and the numbers of an AttentionSpec.
_HARMLESS = {
    "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "return_dict",
    "output_hidden_states", "output_router_logits", "logits_to_keep", "position_embeddings",
}  # fmt: skip
NAME, SURVEY = "kvrun", "kvrun_survey"

running: "ContextVar[Survey | Pass]" = ContextVar("running")


def _attend(module: torch.nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return running.get().attend(module, *args, **kwargs)


def _mask(**kwargs: Any) -> torch.Tensor:
    return running.get().mask(**kwargs)


AttentionInterface.register(NAME, _attend)  # without a mask: transformers makes none then
AttentionInterface.register(SURVEY, _attend)
AttentionMaskInterface.register(SURVEY, _mask)


@dataclass
class Call:
    """One call of the attention function: who calls, and what of."""

    module: torch.nn.Module
    spec: AttentionSpec
    width: int  # of values


class Survey:
    """A forward of one sequence that notes what every layer asks for; it attends to nothing."""

    def __init__(self, farthest: int) -> None:
        self.calls: list[Call] = []
        self._farthest = farthest
        self._windows: dict[int, int | None] = {}  # of the masks handed out, by id
        self._masks: list[torch.Tensor] = []  # keeps the ids taken

    def mask(self, *, mask_function: Any, device: Any = "cpu", **_: Any) -> torch.Tensor:
        """A mark in the place of a mask; what it would hide is found out, far beyond the probe."""
        n = self._farthest
        keys = torch.arange(n, device=device)
        zero = torch.zeros((), dtype=torch.int64, device=device)
        rows = sorted({0, 1, n // 3, n // 2, n - 2, n - 1} & set(range(n)))
        seen = [mask_function(zero, zero, zero + q, keys).expand(n) for q in rows]
        window = int(seen[-1].sum())
        for q, visible in zip(rows, seen, strict=True):
            if not torch.equal(visible.bool(), (keys <= q) & (keys > q - window)):
                raise Unsupported("a mask hides other keys than later ones and those of a window")
        mark = torch.zeros((1, 1, 1, 1), device=device)
        self._masks.append(mark)
        self._windows[id(mark)] = None if window == n else window
        return mark

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        window = options.get("sliding_window")
        if attention_mask is not None:
            if id(attention_mask) not in self._windows:
                raise Unsupported("attention gets a mask of the class's own")
            window = self._windows[id(attention_mask)]
        spec, width = _spec(len(self.calls), module, query, key, value, scaling, window, options)
        self.calls.append(Call(module, spec, width))
        return value.new_zeros(1, query.shape[2], query.shape[1], width), None


def _spec(
    layer: int,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: Any,
    window: Any,
    options: dict[str, Any],
) -> tuple[AttentionSpec, int]:
    """What a call asks for; raises Unsupported for what an AttentionSpec cannot say."""
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    known = _HARMLESS | {"sliding_window", "softcap", "s_aux", "is_causal"}
    more = [name for name, value in options.items() if value is not None and name not in known]
    if more:
        raise Unsupported(f"attention is told '{more[0]}'")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise Unsupported("a layer sees later tokens")
    if key.shape[2] != query.shape[2]:
        raise Unsupported("a layer attends to other tokens than its own sequence's")
    for number in (scaling, softcap, window):
        if number is not None and not isinstance(number, int | float):
            raise Unsupported("a number of attention depends on the input")
    forward = inspect.getsource(type(module).forward)
    if "arange(" in forward or "get_seq_length" in forward:
        raise Unsupported("attention counts positions in another way than by those it is given")
    # Keys and values have one width in the cache.
    head_dim = max(key.shape[-1], value.shape[-1])
    spec = AttentionSpec(
        layer,
        query.shape[1],
        key.shape[1],
        head_dim,
        float(query.shape[-1] ** -0.5 if scaling is None else scaling),
        window=window,
        softcap=softcap or None,
        sinks=None if sinks is None else sinks.detach().float().reshape(-1),
    )
    return spec, value.shape[-1]


class Pass:
    """One forward of a batch: the n-th call is that of the n-th layer, or nothing is answered."""

    def __init__(self, calls: list[Call], batch: Batch) -> None:
        self._calls, self._batch = calls, batch
        self.done = 0

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """query [1, heads, tokens, head_dim] -> [1, tokens, heads, width]"""
        call = self._calls[self.done] if self.done < len(self._calls) else None
        if call is None or call.module is not module or attention_mask is not None:
            raise Unsupported("layers are not called in the order in which they were at first")
        spec, batch = call.spec, self._batch
        said = query.shape[-1] ** -0.5 if scaling is None else scaling
        if said != spec.scale or (options.get("softcap") or None) != spec.softcap:
            raise Unsupported("a layer asks for another attention than at first")
        self.done += 1
        dtype = batch.backend.cache.rows(spec.layer).dtype
        dtype = query.dtype if dtype.itemsize == 1 else dtype  # what is kept may be smaller
        q, k, v = (_packed(x, spec.head_dim, dtype) for x in (query, key, value))
        batch.backend.cache.store(spec.layer, batch.slot_mapping, torch.cat((k, v), 1))
        y = batch.backend.attend(spec, q, k, v, batch)
        y = y.view(1, len(q), spec.heads, spec.head_dim)[..., : call.width]
        return y.to(query.dtype), None

    def mask(self, **_: Any) -> torch.Tensor:
        raise Unsupported("a mask is made where none was expected")


def _packed(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[1, heads, tokens, head_dim] -> [tokens, heads, width], zeros behind"""
    x = x[0].transpose(0, 1).to(dtype)
    short = width - x.shape[-1]
    return torch.nn.functional.pad(x, (0, short)) if short else x.contiguous()
