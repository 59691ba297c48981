"""A model folder that needs no weights: a small llama whose values are made up at load."""

import json
from pathlib import Path

import pytest

from kvrun.runtime.config import EngineConfig

SHAPE = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(SHAPE))
    return path


@pytest.fixture
def config(folder: Path) -> EngineConfig:
    return EngineConfig(
        model=str(folder), device="cpu", dtype="float32", load_format="dummy", threads=1,
        kv_memory=4_000_000, max_num_seqs=16, max_num_batched_tokens=32, block_size=4,
    )  # fmt: skip
