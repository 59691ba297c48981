"""Ways to spoil what kvrun reads, or a part that a family's file names."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kvrun.runtime.layers import named
from kvrun.runtime.layers.embedding import Embedding
from kvrun.runtime.layers.moe import softmax_top, top_softmax
from kvrun.runtime.layers.norm import HeadNorm
from kvrun.runtime.layers.position import Rope
from kvrun.runtime.layers.qkv import packed
from kvrun.runtime.models import qwen3

Tensors = dict[str, torch.Tensor]


def swap_rows(name: str, size: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        for key in [k for k in tensors if name in k]:
            first, second, rest = tensors[key][:size], tensors[key][size : 2 * size], 2 * size
            tensors[key] = torch.cat([second, first, tensors[key][rest:]])
        return tensors

    return change


def swap_after(name: str, first: int, size: int) -> Callable[[Tensors], Tensors]:
    """Two blocks of rows behind the first ones."""

    def change(tensors: Tensors) -> Tensors:
        for key in [k for k in tensors if name in k]:
            head, rest = tensors[key][:first], tensors[key][first:]
            swapped = [rest[size : 2 * size], rest[:size], rest[2 * size :]]
            tensors[key] = torch.cat([head, *swapped])
        return tensors

    return change


def zeroed(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t * 0 if k.endswith(name) else t for k, t in tensors.items()}


def swap_kv_heads(size: int) -> Callable[[Tensors], Tensors]:
    k, v = swap_rows("k_proj", size), swap_rows("v_proj", size)
    return lambda tensors: v(k(tensors))


def swap_names(first: str, second: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        flip = {first: second, second: first}
        return {
            next((k.replace(a, b) for a, b in flip.items() if a in k), k): t
            for k, t in tensors.items()
        }

    return change


def minus_one(tensors: Tensors) -> Tensors:
    return {k: t - 1 if "norm" in k else t for k, t in tensors.items()}


def no_biases(tensors: Tensors) -> Tensors:
    return {k: t * 0 if k.endswith("bias") else t for k, t in tensors.items()}


def scale_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "Embedding", lambda *args, scale, more: Embedding(*args))


def no_head_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_drop(*args: Any) -> None:
        HeadNorm(*args)

    monkeypatch.setattr(qwen3, "HeadNorm", read_and_drop)


def replaced(module: Any, name: str, change: Callable[[Any], Any]) -> Callable[..., None]:
    """Puts change(what is there) in the place of a part that a family's file names."""

    def apply(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, name, change(getattr(module, name)))

    return apply


def without(option: str) -> Callable[[Any], Any]:
    """The same part without an option."""

    def change(part: Any) -> Any:
        return lambda *args, **options: part(*args, **{**options, option: None})

    return change


def halves(part: Any) -> Any:
    return lambda *args, interleaved: Rope(*args)


def one_weight(part: Any) -> Any:
    """The weight of the first head for all."""

    def norm(weight: torch.Tensor, bias: Any, eps: float) -> Any:
        return part(weight[:1].expand_as(weight), bias, eps)

    return norm


def as_packed(part: Any) -> Any:
    return packed


def headless(part: Any) -> Any:
    def head(w: Any, name: str, *args: Any, **options: Any) -> Any:
        w.read(f"{name}.bias", (128,))
        return part(w, name, *args, **{**options, "bias": False})

    return head


def eight(part: Any) -> Any:
    return lambda heads, device, *most: part(8, device)[:heads]


def sixteenfold(part: Any) -> Any:
    """Heads have 16 dimensions here: times four undoes the scale."""
    return lambda heads, device: part(heads, device) * 4


def no_offset(part: Any) -> Any:
    def positions(*args: Any, offset: int) -> Any:
        found = part(*args, offset=offset)
        found._table = args[0].read(f"{args[2]}.weight", (len(found._table) + offset, args[4]))
        return found

    return positions


def by_top_softmax(part: Any) -> Any:
    return lambda count, **options: top_softmax(count)


def by_softmax_top(part: Any) -> Any:
    return lambda count: softmax_top(count)


def corrected_weights(part: Any) -> Any:
    """Weights from the scores that the correction has moved, as if it were no mere choice."""

    def route(w: Any, p: str) -> Any:
        inner = part(w, p)
        bias = w.read(f"{p}.e_score_correction_bias", (6,), dtype=torch.float32)

        def moved(logits: torch.Tensor) -> Any:
            weights, chosen = inner(logits)
            return weights + bias[chosen], chosen

        return moved

    return route


def unshared(part: Any) -> Any:
    return lambda *args, **options: part(*args, **{**options, "shared": None})


def halved(part: Any) -> Any:
    """Gates and ups taken for the two halves of a stack in which they alternate."""
    return lambda *args, **options: part(*args, **options | {"alternate": False})


def dropped(part: Any) -> Any:
    return lambda *args: None


def in_one_group(part: Any) -> Any:
    return lambda w, name, size, heads: part(w, name, dataclasses.replace(size, groups=1), heads)
