"""Stacks: experts as a model's files hold them, for `fuse`: in one tensor, or each by itself."""

import re
from collections.abc import Callable, Mapping

import torch

from kvrun.errors import Unsupported
from kvrun.runtime.checkpoint import Product, Shard

_ONE = re.compile(r"(.+)\.(\d+)\.([^.]+)\.weight")
_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
Views = Callable[[int], tuple[torch.Tensor, torch.Tensor]]


class Stacks:
    """All experts of a model, by the shapes of its tensors; their products begin at `first`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], first: int) -> None:
        self._first = first
        self.products: list[Product] = []
        # Tensor -> its site; which expert it is, None for all; and its rows of an expert's matrix.
        self.names: dict[str, tuple[int, int | None, slice]] = {}
        for name, shape in shapes.items():
            if len(shape) == 3:
                self.names[name] = first + len(self.products), None, slice(None)
                shard = Shard(name.removesuffix(".weight"), *shape[1:])
                self.products.append(Product((shard,), "experts", shape[0]))
        listed: dict[str, dict[int, dict[str, str]]] = {}
        for name in shapes:
            if match := _ONE.fullmatch(name):
                listed.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = name
        for prefix, experts in listed.items():
            for parts in _PARTS:
                if all(own.keys() == set(parts) for own in experts.values()):
                    self._add_listed(prefix, experts, parts, shapes)

    def _add_listed(
        self,
        prefix: str,
        experts: Mapping[int, Mapping[str, str]],
        parts: tuple[str, str, str],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> None:
        gate, up, down = parts
        inner, hidden = shapes[experts[0][gate]]
        site = self._first + len(self.products)
        for number, own in experts.items():
            self.names[own[gate]] = site, number, slice(inner)
            self.names[own[up]] = site, number, slice(inner, None)
            self.names[own[down]] = site + 1, number, slice(None)
        both, back = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
        self.products.append(Product((Shard(both, 2 * inner, hidden),), "experts", len(experts)))
        self.products.append(Product((Shard(back, hidden, inner),), "experts", len(experts)))

    def count(self, changed: set[int]) -> int:
        """How many tensors belong to these sites."""
        return sum(site in changed for site, _, _ in self.names.values())

    def add(self, name: str, tensor: torch.Tensor, views: Views) -> torch.Tensor:
        """What becomes of a tensor; `views` gives A [experts * rank, in] and B transposed of a
        site. Raises Unsupported where nothing tells which way a matrix lies."""
        site, expert, rows = self.names[name]
        a, b = views(site)
        if not len(a):
            return tensor
        count = self.products[site - self._first].copies
        a, b = a.view(count, -1, a.shape[1]), b.view(count, -1, b.shape[1])
        if expert is not None:
            return tensor.copy_(tensor.float() + (b[expert].t() @ a[expert])[rows])
        if tensor.shape[1] == tensor.shape[2]:
            raise Unsupported(
                f"an adapter cannot be fused into {name}.",
                cause="its matrices are square: nothing tells which way they lie",
                hint="serve it beside the model",
            )
        for matrix, low, high in zip(tensor, a, b, strict=True):
            matrix.copy_(matrix.float() + high.t() @ low)
        return tensor
