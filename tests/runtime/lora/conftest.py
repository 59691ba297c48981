"""A small llama whose weights are made up, and adapters for it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kvrun.runtime.config import EngineConfig
from tests.runtime.engine.conftest import SHAPE
from tests.runtime.lora.adapters import write, write_kinds

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


KINDS = ["dora", "tables", "saved", "biased", "four"]


@pytest.fixture(scope="session")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    made = write_kinds(tmp_path_factory.mktemp("kinds"), SHAPES, vocab=96)
    return {name: made[name] for name in KINDS}
