"""One layer by AWQ: what is stored, what feeds it, and the values for what comes in."""

from types import SimpleNamespace
from typing import Any

import torch

from kvrun.runtime.calibrate import store
from kvrun.runtime.calibrate.layer import Way
from kvrun.runtime.calibrate.layers import Hessian
from kvrun.runtime.checkpoint import Shard

P = "model.layers.0"
SHAPES = {
    f"{P}.self_attn.q_proj": (32, 64), f"{P}.self_attn.k_proj": (16, 64),
    f"{P}.mlp.gate_proj": (96, 64), f"{P}.mlp.up_proj": (96, 64), f"{P}.mlp.down_proj": (64, 96),
}  # fmt: skip


def seen(x: torch.Tensor, *names: str) -> Any:
    hessian = Hessian()
    for part in x.split(100):
        hessian.add(part)
    assert hessian.rows == len(x)
    shards = [Shard(f"{P}.{name}", *SHAPES[f"{P}.{name}"]) for name in names]
    return SimpleNamespace(shards=shards, seen=hessian)


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got - ref).norm() / ref.norm())


def test_factors_move_into_what_comes_before() -> None:
    torch.manual_seed(3)
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    large = torch.ones(96)
    large[::16] = 30
    x, inner = torch.randn(300, 64) * large[:64], torch.randn(300, 96) * large
    norm = f"{P}.post_attention_layernorm.weight"
    norms = {norm: torch.rand(64) + 0.5}
    lazy = [
        seen(x, "self_attn.q_proj", "self_attn.k_proj"),
        seen(x, "mlp.gate_proj", "mlp.up_proj"),
        seen(inner, "mlp.down_proj"),
    ]
    made = Way("awq", 32, torch.float32).make(weights, lazy, norms)
    # q and k have no norm here that could take factors in.
    assert set(made.columns) == {f"{P}.mlp.{n}" for n in ("gate_proj", "up_proj", "down_proj")}
    assert set(made.rows) == {f"{P}.mlp.up_proj"}
    for name, weight in weights.items():
        assert off(made.values[name], weight) < 0.2
    stored = {
        name: store.values_of(
            {key[len(name) + 1 :]: t for key, t in made.tensors.items() if key.startswith(name)},
            4,
            "compressed-tensors",
        )
        for name in weights
    }
    # The file's norm with the file's matrices is the norm before with the values.
    for name in ("gate_proj", "up_proj"):
        full = f"{P}.mlp.{name}"
        got = (x * made.tensors[norm]) @ stored[full].t()
        want = (x * norms[norm]) @ made.values[full].t()
        if name == "up_proj":
            want = want * made.rows[full]
        assert off(got, want) < 1e-4
    got = (inner * made.rows[f"{P}.mlp.up_proj"]) @ stored[f"{P}.mlp.down_proj"].t()
    assert off(got, inner @ made.values[f"{P}.mlp.down_proj"].t()) < 1e-4


def test_what_saw_nothing_is_rounded_plainly() -> None:
    weights = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    for method in ("gptq", "awq"):
        made = Way(method, 32, torch.float32).make(weights, [], {})
        plain = Way("int4", 32, torch.float32).make(weights, [], {})
        assert made.tensors.keys() == plain.tensors.keys()
        for name, tensor in made.tensors.items():
            assert torch.equal(tensor, plain.tensors[name])
