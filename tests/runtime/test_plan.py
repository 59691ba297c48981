"""Plan: sizes from what is free, and refusals that say what would fit."""

from typing import Any

import pytest

from kvrun.errors import InvalidRequest, Unsupported
from kvrun.runtime.config import EngineConfig
from kvrun.runtime.plan import Plan, make_plan, size


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "weight_bytes": 14_000_000,
        "kv_bytes_per_block": 16_000,  # 16 tokens of 1 kB
        "free_bytes": 1_000_000_000,
        "on_cpu": True,
        "kv_memory": None,
        "block_size": 16,
        "max_num_seqs": 4,
        "max_position": 2048,
        "max_model_len": None,
    }
    return make_plan(**{**values, **changes})


def test_no_more_than_can_be_used() -> None:
    assert plan().kv_tokens == 4 * 2048
    assert plan().max_model_len == 2048
    assert plan().line() == "weights 14.0 MB, KV 8.2 MB = 8,192 tokens, context 2,048"


def test_an_unset_context_shrinks_to_what_fits() -> None:
    small = plan(kv_memory=1_000_000)
    assert small.kv_tokens == 61 * 16  # 62 blocks of 16 kB, one of them padding
    assert small.max_model_len == 61 * 16


def test_a_context_asked_for_is_kept_or_refused() -> None:
    assert plan(max_model_len=1024).max_model_len == 1024
    with pytest.raises(Unsupported, match="made for 2,048"):
        plan(max_model_len=2049)
    with pytest.raises(Unsupported, match="2,048 tokens needs") as caught:
        plan(kv_memory=1_000_000, max_model_len=2048)
    assert caught.value.hint == "max_model_len=976 fits"


def test_fractions_and_bytes() -> None:
    assert plan(kv_memory=0.001).kv_tokens == 61 * 16
    with pytest.raises(Unsupported, match="2.0 GB, but 1.0 GB are free"):
        plan(kv_memory=2_000_000_000)
    with pytest.raises(Unsupported, match="free some memory"):
        plan(free_bytes=10_000)


def test_sizes_for_people() -> None:
    assert [size(n) for n in (999, 1500, 14_680_000, 528_000_000, 2_140_000_000)] == [
        "999 B", "1.5 kB", "14.7 MB", "528 MB", "2.1 GB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": "int3"},
        {"device": "tpu"},
        {"block_size": 0},
        {"kv_memory": -1},
        {"threads": 0},
        {"kv_memory": float("nan")},
        {"step_timeout": 0},
        {"run_ahead": -1},
    ],
)
def test_configurations_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        EngineConfig(model="x", **wrong)
