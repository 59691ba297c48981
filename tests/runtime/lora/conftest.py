"""A small llama whose weights are made up, and adapters for it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun.runtime.config import EngineConfig
from tests.runtime.engine.conftest import SHAPE
from tests.runtime.lora.adapters import edit, write

E, INNER, KV = SHAPE["hidden_size"], SHAPE["intermediate_size"], 16
SHAPES = {
    f"model.layers.{n}.{name}": shape
    for n in range(2)
    for name, shape in {
        "self_attn.q_proj": (E, E),
        "self_attn.k_proj": (KV, E),
        "self_attn.v_proj": (KV, E),
        "self_attn.o_proj": (E, E),
        "mlp.gate_proj": (INNER, E),
        "mlp.up_proj": (INNER, E),
        "mlp.down_proj": (E, INNER),
    }.items()
}
RANKS = {"one": 1, "four": 4, "eight": 8, "sixteen": 16}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    for seed, (name, rank) in enumerate(RANKS.items()):
        write(root / name, SHAPES, rank, alpha=2 * rank, seed=seed, spread=0.5)
    return {name: str(root / name) for name in RANKS}


@pytest.fixture
def config(base: Path, adapters: dict[str, str]) -> Any:
    def make(**changes: Any) -> EngineConfig:
        values = EngineConfig(
            model=str(base), device="cpu", dtype="float32", load_format="dummy", threads=1,
            kv_memory=4_000_000, max_num_seqs=16, max_num_batched_tokens=32, block_size=4,
            adapters=adapters, lora_memory=10_000_000,
        )  # fmt: skip
        return dataclasses.replace(values, **changes)

    return make


HEAD, EMBED = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
Q = {name: shape for name, shape in SHAPES.items() if "q_proj" in name}
KINDS = ["dora", "tables", "saved", "biased", "four"]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.5


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("kinds")
    for seed, name in enumerate(KINDS):
        write(root / name, SHAPES if name == "dora" else Q, seed=seed, spread=0.5)
    magnitudes = {
        f"base_model.model.{n}.lora_magnitude_vector": random(7, out).abs() + 0.2
        for n, (out, _) in SHAPES.items()
    }
    edit(root / "dora", lambda t: {**t, **magnitudes}, use_dora=True)
    tables = {
        f"{EMBED}.lora_embedding_A": random(1, 4, 96), f"{EMBED}.lora_embedding_B": random(2, E, 4),
        f"{HEAD}.lora_A.weight": random(3, 4, E), f"{HEAD}.lora_B.weight": random(4, 96, 4),
    }  # fmt: skip
    edit(root / "tables", lambda t: {**t, **tables})
    saved = {f"{EMBED}.weight": random(5, 96, E), f"{HEAD}.weight": random(6, 96, E)}
    edit(root / "saved", lambda t: {**t, **saved}, modules_to_save=["lm_head"])
    biases = {f"base_model.model.{n}.base_layer.bias": random(9, E) for n in Q}
    edit(root / "biased", lambda t: {**t, **biases}, bias="lora_only")
    return {name: str(root / name) for name in KINDS}
