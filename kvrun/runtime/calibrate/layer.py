"""One layer's matrices into codes, by each method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from kvrun.runtime.calibrate import solve, store
from kvrun.runtime.calibrate.layers import Lazy
from kvrun.runtime.quant import _round

# What can be divided by AWQ's factors before some matrices see it, where blocks are Llama's.
_NORMS = {
    ("q_proj", "k_proj", "v_proj"): "input_layernorm",
    ("gate_proj", "up_proj"): "post_attention_layernorm",
}
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")


@dataclass
class Made:
    """Of a layer: tensors to be written, by their full names; factors by which columns and rows of
    matrices were multiplied before they became codes; and their values without these factors."""

    tensors: store.Tensors = field(default_factory=dict)
    columns: dict[str, torch.Tensor] = field(default_factory=dict)
    rows: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def add(self, name: str, tensors: store.Tensors, values: torch.Tensor) -> None:
        self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in tensors.items()}
        if name in self.columns:
            values = values / self.columns[name]
        if name in self.rows:
            values = values / self.rows[name][:, None]
        self.values[name] = values


@dataclass(frozen=True)
class Way:
    """How matrices are rounded; `group` None: a scale for each row."""

    method: str
    group: int | None
    dtype: torch.dtype  # of the model, and of scales where the format does not say another
    form: str = "compressed-tensors"  # of store.FORMATS

    def make(
        self,
        weights: Mapping[str, torch.Tensor],
        lazy: Sequence[Lazy],
        norms: Mapping[str, torch.Tensor],
    ) -> Made:
        """`weights` fp32 [N, K] by name; `lazy`: what they have seen; `norms` that may be changed,
        fp32, by name."""
        made = Made()
        if self.method == "awq":
            self._shift(made, weights, lazy, norms)
        seen = {shard.name: one.seen for one in lazy for shard in one.shards}
        last: tuple[object, torch.Tensor | None] = (
            None,
            None,
        )  # matrices of one input are neighbours
        for name, weight in weights.items():
            columns, rows = made.columns.get(name), made.rows.get(name)
            if columns is not None:
                weight = weight * columns
            if rows is not None:
                weight = weight * rows[:, None]
            hessian = None
            if (sight := seen.get(name)) is not None and sight.sum is not None:
                if sight is not last[0]:
                    last = sight, solve.damped(sight.sum, sight.rows)
                hessian = last[1]
                if columns is not None and hessian is not None:
                    hessian = hessian / columns / columns[:, None]
            made.add(name, *self._codes(weight, hessian))
        return made

    def _codes(
        self, weight: torch.Tensor, hessian: torch.Tensor | None
    ) -> tuple[store.Tensors, torch.Tensor]:
        if self.method == "fp8":
            return store.e4m3(weight.to(self.dtype))
        if self.form == "bitsandbytes":
            return (store.nf4 if self.method == "nf4" else store.rows)(weight.to(self.dtype))
        bits, group = store.BITS[self.method], self.group or weight.shape[1]
        dtype = torch.float16 if self.form in store.HALF else self.dtype
        if self.method == "gptq" and hessian is not None:
            made = solve.gptq(weight, hessian, bits, group, dtype)
        else:
            weigh = None if hessian is None else hessian.diagonal()
            made = _round.whole(
                weight,
                bits,
                group,
                symmetric=self.form != "awq",  # which has room for zeros
                importance=weigh,
                dtype=dtype,
            )
        return store.integers(made, self.form)

    def _shift(
        self,
        made: Made,
        weights: Mapping[str, torch.Tensor],
        lazy: Sequence[Lazy],
        norms: Mapping[str, torch.Tensor],
    ) -> None:
        """AWQ's factors, where what feeds a matrix can take them in."""
        for one in lazy:
            names = [shard.name for shard in one.shards]
            if one.seen is None or one.seen.sum is None or not set(names) <= set(weights):
                continue
            hessian = solve.damped(one.seen.sum, one.seen.rows)
            prefix, last = _parts(names)
            norm = f"{prefix}.{_NORMS.get(last)}.weight"
            up = f"{prefix}.mlp.up_proj"
            if norm in norms:
                factor = self._factor([weights[name] for name in names], hessian)
                made.tensors[norm] = (norms[norm] / factor).to(self.dtype)
                made.columns |= dict.fromkeys(names, factor)
            elif last == ("down_proj",) and up in weights:
                factor = self._factor([weights[names[0]]], hessian)
                made.columns[names[0]] = factor
                made.rows[up] = 1 / factor

    def _factor(self, weights: Sequence[torch.Tensor], hessian: torch.Tensor) -> torch.Tensor:
        bits = store.BITS[self.method]
        return solve.scales(weights, hessian, bits, self.group or len(hessian))


def _parts(names: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """The name of the layer, and what its matrices are called."""
    whole = [name.rsplit(".", 2) for name in names]
    return whole[0][0], tuple(parts[-1] for parts in whole)
