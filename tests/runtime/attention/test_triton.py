"""kvrun's own backend in whole models: tokens that its kernel of single queries also stores."""

from pathlib import Path
from typing import Any

import pytest

from kvrun.runtime.attention.triton import Attention
from kvrun.runtime.kernels.triton import paged_attention
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.models.compare import TOLERANCE, stepwise

STEPS = 4  # of single tokens, in `stepwise`
# How their queries and keys become what is attended, and the layers whose kernel does it.
FAMILIES = {
    ("llama", "v2"): 2,
    ("qwen3", "plain"): 2,  # norms
    ("cohere", "plain"): 2,  # neighbours are pairs
    ("gptj", "plain"): 2,  # neighbours, of a part of a head
    ("phi", "2"): 2,  # part of a head
    ("phi", "qk norm"): 2,  # norms that the kernel does not know
    ("gemma2", "plain"): 2,  # window and soft cap
    ("smollm3", "plain"): 1,  # one layer of two rotates
    ("gpt_oss", "plain"): 2,  # sinks
}


@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_a_step_stores_what_it_attends_to(
    family: str, variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    append_and_decode = paged_attention.append_and_decode

    def counted(*given: Any) -> Any:
        calls.append(len(given[0]))
        return append_and_decode(*given)

    monkeypatch.setattr(paged_attention, "append_and_decode", counted)
    oracle = zoo.make(tmp_path, family, variant)
    driver = Driver(tmp_path, backend_type=Attention)
    driver.backend._kernel = paged_attention  # type: ignore[attr-defined]
    assert stepwise(driver, oracle) <= TOLERANCE
    assert calls == [2] * (STEPS * FAMILIES[family, variant])
