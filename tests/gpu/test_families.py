"""Every family on a CUDA device says what it says on CPU: captured, launched, and in bf16.

CPU's answers are those of transformers (tests/runtime/models). `-k llama` picks families.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from kvrun import LLM
from tests.gpu.beside import DEVICE, PROMPTS, Asked, Said, check_16, check_fp32, say
from tests.runtime.models import every
from tests.runtime.models.attending import SHOWN
from tests.runtime.models.compare import prompt
from tests.runtime.vision import eyes
from tests.runtime.vision.test_engine import ids_with

pytestmark = pytest.mark.gpu


def text(folder: Path, family: str, variant: str) -> Asked:
    every.make(folder, family, variant)
    if family == "idefics":
        return _seeing(folder, family, [(ids, list(seeds)) for ids, seeds in SHOWN])
    if family == "baichuan":  # made for 64 tokens
        return Asked(folder, [ids[-50:] for ids in PROMPTS])
    return Asked(folder, encoded=family in every.ENCODED)


def image(folder: Path, family: str) -> Asked:
    eyes.make(folder, family)
    with LLM(str(folder), device="cpu", dtype="float32", max_model_len=64) as llm:
        shown = [[0], [1, 2], [3]]
        known = [(ids_with(llm._engine._limits, family, seeds), seeds) for seeds in shown]
    return _seeing(folder, family, [*known, (prompt(31, 6), []), (prompt(32, 17), [])])


def _seeing(folder: Path, family: str, shown: list[tuple[list[int], list[int]]]) -> Asked:
    images = [[eyes.image(family, seed) for seed in seeds] for _, seeds in shown]
    return Asked(folder, [ids for ids, _ in shown], images)


Make = Callable[[Path], Asked]
CASES: dict[str, Make] = {
    f"{family}-{variant}": lambda folder, case=(family, variant): text(folder, *case)
    for family, variant in every.variants()
} | {
    f"sees {family}": lambda folder, family=family: image(folder, family)
    for family in eyes.FAMILIES
    if not family.startswith("idefics") or family == "idefics2"
}  # fmt: skip


@dataclass
class Case:
    name: str
    asked: Asked

    @cached_property
    def wanted(self) -> Said:
        return say(self.asked, "cpu")


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, CASES[request.param](tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("graphs", [True, False], ids=["captured", "launched"])
def test_fp32(case: Case, graphs: bool) -> None:
    found = say(case.asked, DEVICE, cuda_graphs=graphs)
    check_fp32(f"{case.name}, {'captured' if graphs else 'launched'}", found, case.wanted)


def test_bf16(case: Case) -> None:
    found = say(case.asked, DEVICE, dtype="bfloat16")
    rounded = say(case.asked, "cpu", dtype="bfloat16")
    check_16(case.name, found, case.wanted, rounded)
