"""Adapters of every kind on a CUDA device say what they say on CPU, side by side in one batch.

CPU's answers are those of PEFT (tests/runtime/lora).
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest

from tests.gpu.beside import DEVICE, Asked, Said, check_16, check_fp32, say
from tests.runtime.lora.adapters import write, write_kinds
from tests.runtime.models import zoo
from tests.runtime.models.compare import prompt

pytestmark = pytest.mark.gpu

Shapes = dict[str, tuple[int, int]]


def layers(*modules: tuple[str, int, int]) -> Shapes:
    return {f"model.layers.{n}.{name}": (out, k) for n in range(2) for name, out, k in modules}


QO = [("self_attn.q_proj", 64, 64), ("self_attn.o_proj", 64, 64)]
MLP = [("mlp.gate_proj", 96, 64), ("mlp.up_proj", 96, 64), ("mlp.down_proj", 64, 96)]


def attention(kv: int) -> list[tuple[str, int, int]]:
    return [*QO, ("self_attn.k_proj", kv, 64), ("self_attn.v_proj", kv, 64)]


def ranks(place: Path, shapes: Shapes) -> dict[str, str]:
    """Of A and B alone, for graphs to hold."""
    found = {f"rank {rank}": rank for rank in (1, 4, 16, 64)}
    for seed, (name, rank) in enumerate(found.items()):
        write(place / name, shapes, rank, alpha=8, seed=seed, spread=0.3 if rank < 64 else 0.1)
    return {name: str(place / name) for name in found}


def kinds(place: Path, shapes: Shapes) -> dict[str, str]:
    return write_kinds(place, shapes, vocab=128)


def experts(place: Path, shapes: Shapes) -> dict[str, str]:
    """Of matrices of some experts, of all in PEFT's stacks, and of none."""
    moe = "block_sparse_moe.experts"
    single = layers((f"{moe}.0.w1", 96, 64), (f"{moe}.0.w2", 64, 96), (f"{moe}.3.w3", 96, 64))
    stacks = layers(("mlp.experts", 64, 96), ("mlp.experts.base_layer", 192, 64))
    write(place / "single", single, spread=0.3)
    write(place / "all", stacks, 4 * 5, r=4, seed=1, spread=0.3)  # five experts of rank 4
    write(place / "beside", shapes, seed=2, spread=0.3)
    return {name: str(place / name) for name in ("single", "all", "beside")}


BASES = {
    "ranks": ("llama", "biases", [*attention(16), *MLP], ranks),
    "kinds": ("llama", "biases", [*attention(16), *MLP], kinds),
    "kinds, tied": ("qwen2", "tied", [*attention(32), *MLP], kinds),
    "experts": ("mixtral", "plain", QO, experts),
}


@dataclass
class Case:
    name: str
    asked: Asked
    adapters: dict[str, str]

    @cached_property
    def wanted(self) -> Said:
        return say(self.asked, "cpu", adapters=self.adapters)


@pytest.fixture(scope="module", params=BASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, variant, modules, make = BASES[request.param]
    folder = tmp_path_factory.mktemp("base")
    zoo.make(folder, family, variant)
    adapters = make(folder, layers(*modules))
    names = [*adapters, None]
    prompts = [prompt(20 + n, (70, 5, 33, 18)[n % 4]) for n in range(len(names))]
    return Case(request.param, Asked(folder, prompts, adapters=names), adapters)


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "launched"])
def test_fp32(case: Case, graphs: bool) -> None:
    found = say(case.asked, DEVICE, adapters=case.adapters, cuda_graphs=graphs)
    check_fp32(f"adapters, {case.name}", found, case.wanted)


def test_bf16(case: Case) -> None:
    options = {"dtype": "bfloat16", "adapters": case.adapters}
    found, rounded = say(case.asked, DEVICE, **options), say(case.asked, "cpu", **options)
    check_16(f"adapters, {case.name}", found, case.wanted, rounded)


def test_every_adapter_matters(case: Case) -> None:
    """Else the comparisons above would prove little."""
    base = say(replace(case.asked, adapters=None), DEVICE)
    for name, ours, theirs in zip(
        case.adapters, case.wanted.scored[:-1], base.scored[:-1], strict=True
    ):
        assert ours.prompt_logprobs is not None
        assert theirs.prompt_logprobs is not None
        pairs = zip(ours.prompt_logprobs, theirs.prompt_logprobs, strict=True)
        assert max(abs(a.logprob - b.logprob) for a, b in pairs) > 0.05, name
