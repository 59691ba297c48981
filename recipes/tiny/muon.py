"""Muon: momentum whose matrix updates are made orthogonal (Jordan et al., 2024)."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


def orthogonal(g: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrices of a stack [n, rows, columns]: a quintic iteration."""
    x = g.bfloat16()
    flip = x.size(-2) > x.size(-1)
    x = x.mT if flip else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return (x.mT if flip else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon for 2-D weights; equal shapes are stacked so that a step is a few large products."""

    def __init__(
        self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[tuple(p.shape)].append(p)
            for (rows, columns), params in shapes.items():
                grads = torch.stack([p.grad for p in params])
                buffer = self.state[params[0]].setdefault("momentum", torch.zeros_like(grads))
                buffer.lerp_(grads, 1 - group["momentum"])
                update = orthogonal(grads.lerp(buffer, group["momentum"]))
                update *= max(1.0, rows / columns) ** 0.5 * group["lr"]
                for p, u in zip(params, update.unbind(), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).sub_(u)
