"""Rotary positions: scaled frequencies, halves and pairs, and parts of a head."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.layers.position import Rope, alibi_slopes, scaled_frequencies

CPU = torch.device("cpu")
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = [
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128, **LLAMA3},
    {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192, **LLAMA3},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
     "mscale": 0.707, "mscale_all_dim": 1.0, "beta_fast": 24.0, "beta_slow": 2.0},
    {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096,
     "attention_factor": 1.25, "truncate": False},
]  # fmt: skip


def parameters(**values: Any) -> HFConfig:
    return HFConfig({"model_type": "x", "rope_parameters": values}).rope()


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_scalings_are_those_of_transformers(scaling: dict[str, Any], theta: float) -> None:
    oracle = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    wanted, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](oracle, CPU)
    values = {**scaling, "rope_theta": theta}
    found, ours = scaled_frequencies(parameters(**values), 64)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)
    assert math.isclose(ours, factor, rel_tol=1e-6)


def test_unknown_scaling_and_odd_widths_are_refused() -> None:
    with pytest.raises(Unsupported, match="proportional"):
        scaled_frequencies(parameters(rope_type="proportional"), 64)
    with pytest.raises(Unsupported, match="7 dimensions"):
        scaled_frequencies(parameters(), 7)
    with pytest.raises(BadCheckpoint, match="factor"):
        scaled_frequencies(parameters(rope_type="linear"), 64)


@pytest.mark.parametrize("longest", [64, 65, 512])
def test_longrope_is_that_of_transformers(longest: int) -> None:
    lists = {
        "short_factor": [1.0 + i / 64 for i in range(32)],
        "long_factor": [1.0 + i for i in range(32)],
    }
    oracle = Phi3Config(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=longest,
        original_max_position_embeddings=64,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **lists},
    )
    wanted, factor = ROPE_INIT_FUNCTIONS["longrope"](oracle, CPU, seq_len=longest)
    said = {"rope_type": "longrope", "rope_theta": 1e4, **lists}
    found, ours = scaled_frequencies(
        HFConfig(
            {
                "model_type": "x",
                "rope_scaling": said,
                "max_position_embeddings": longest,
                "original_max_position_embeddings": 64,
            }
        ).rope(),
        64,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0.0)
    assert math.isclose(ours, factor, rel_tol=1e-6)


def test_longrope_needs_a_number_for_every_frequency() -> None:
    few = {"short_factor": [1.0] * 31, "long_factor": [1.0] * 32}
    with pytest.raises(BadCheckpoint, match="short_factor.* must be a list of 32 numbers"):
        scaled_frequencies(
            parameters(
                rope_type="longrope",
                original_max_position_embeddings=8,
                max_position_embeddings=8,
                **few,
            ),
            64,
        )


def test_dynamic_scaling_changes_nothing_within_the_context() -> None:
    given = parameters(rope_type="dynamic", factor=4.0)
    found, factor = scaled_frequencies(given, 64)
    assert torch.equal(found, scaled_frequencies(parameters(), 64)[0])
    assert factor == 1.0


@pytest.mark.parametrize(("heads", "wanted"), [(4, [0.25, 1 / 16]), (6, [0.25, 1 / 16])])
def test_alibi_slopes(heads: int, wanted: list[float]) -> None:
    slopes = alibi_slopes(heads, CPU)
    assert slopes[:2].tolist() == wanted
    assert slopes[4:].tolist() == [0.5, 0.125][: heads - 4]


def rotated(x: torch.Tensor, positions: list[int], pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Each pair of dimensions as a complex number, turned by position · 10000^(-i / n)."""
    out = x.double().clone()
    for i, (a, b) in enumerate(pairs):
        for row, position in enumerate(positions):
            angle = position * 10000.0 ** (-i / len(pairs))
            turn = complex(math.cos(angle), math.sin(angle))
            for head in range(x.shape[1]):
                z = complex(float(x[row, head, a]), float(x[row, head, b])) * turn
                out[row, head, a], out[row, head, b] = z.real, z.imag
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("part", [1.0, 0.5, 0.25])
def test_pairs_are_turned_by_their_angles(interleaved: bool, part: float) -> None:
    torch.manual_seed(0)
    width = int(16 * part)
    half = width // 2
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, i + half) for i in range(half)]
    positions = [0, 5, 17]
    x = torch.randn(3, 5, 16)[:, :3]  # strided, as queries and keys are
    wanted = rotated(x, positions, pairs)
    rope = Rope(
        parameters(partial_rotary_factor=part), 16, torch.float32, CPU, interleaved=interleaved
    )
    batch: Any = SimpleNamespace(positions=torch.tensor(positions), shared={})
    rope(x, batch)
    torch.testing.assert_close(x.double(), wanted, rtol=1e-5, atol=1e-5)


def test_tables_are_made_once_a_step() -> None:
    rope = Rope(parameters(), 16, torch.float32, CPU)
    batch: Any = SimpleNamespace(positions=torch.tensor([3]), shared={})
    rope(torch.randn(1, 2, 16), batch)
    tables = batch.shared[rope]
    rope(torch.randn(1, 2, 16), batch)
    assert batch.shared[rope] is tables
