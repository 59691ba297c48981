"""Every family of the folder gives the logits that transformers gives."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun import folder as registry
from kvrun.runtime.quant import dense
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.models.compare import LONG, TOLERANCE, greedy, prompt, reference, stepwise, worst


def test_every_family_of_the_folder_is_compared() -> None:
    # test_baichuan.py: transformers does not have it; test_encoder_decoder.py, test_idefics.py
    elsewhere = {"baichuan", "t5", "mt5", "umt5", "idefics"}
    assert set(zoo.VARIANTS) | elsewhere == set(registry.names("kvrun.runtime.models"))


def test_the_page_of_families_lists_the_folder() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    _, *tables, seeing = page.split("| `model_type` |")
    assert len(tables) == 3
    for table in tables:
        listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
        assert listed == registry.names("kvrun.runtime.models")
    listed = [kind.split("-")[0] for kind in re.findall(r"^\| `([\w-]+)` \|", seeing, re.MULTILINE)]
    assert set(listed) == set(registry.names("kvrun.runtime.vision.towers"))
    assert "**no**" not in page


@pytest.mark.parametrize("small", [0, 1 << 16], ids=["packed", "plain"])
def test_prefill_and_steps(
    model: tuple[Path, Any], small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_SMALL", small)  # the models here are smaller than real ones
    folder, oracle = model
    assert stepwise(Driver(folder), oracle) <= TOLERANCE


def test_logits_are_large_enough_to_differ(model: tuple[Path, Any]) -> None:
    logits = reference(model[1], prompt(1, LONG))
    assert logits.std(dim=-1).min() > 1.0


def test_chunks_beside_decodes_and_a_shared_prefix(model: tuple[Path, Any]) -> None:
    folder, oracle = model
    driver = Driver(folder)
    a, b = prompt(3, 21), prompt(4, 16)
    c = a[:8] + prompt(5, 9)
    rows: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}

    def step(*work: tuple[int, list[int]]) -> None:
        for (sequence, _), logits in zip(work, driver.step(list(work)), strict=True):
            rows[sequence].append(logits)

    step((0, a[:3]))
    step((1, b[:6]), (0, a[3:11]))
    step((0, a[11:12]), (1, b[6:7]))
    if driver.model.states:  # which nobody can share
        step((2, c[:8]))
    else:
        driver.share(0, 2, 8)
        rows[2].append(reference(oracle, c)[:8])
    step((2, c[8:13]), (0, a[12:13]), (1, b[7:10]))  # a chunk, a decode, three to verify
    step((0, a[13:]), (1, b[10:]), (2, c[13:]))
    for sequence, ids in enumerate((a, b, c)):
        assert worst(rows[sequence], reference(oracle, ids)) <= TOLERANCE


def test_64_greedy_tokens(model: tuple[Path, Any]) -> None:
    folder, oracle = model
    driver = Driver(folder)
    prompts = [prompt(10 + i, 12) for i in range(4)]
    work = list(enumerate(prompts))
    found: list[list[int]] = [[] for _ in prompts]
    for _ in range(64):
        logits = driver.step(work)
        work = [(i, [int(rows[-1].argmax())]) for i, rows in enumerate(logits)]
        for i, ids in work:
            found[i] += ids
    assert found == greedy(oracle, prompts, found)


def test_bfloat16_is_as_near_to_float32_as_transformers_is(model: tuple[Path, Any]) -> None:
    folder, oracle = model
    prompts = [prompt(seed, LONG) for seed in (6, 7, 8)]
    rounded = type(oracle).from_pretrained(folder, dtype=torch.bfloat16)
    driver = Driver(folder, dtype=torch.bfloat16)
    rows = [[x] for x in driver.step([(i, ids[:-3]) for i, ids in enumerate(prompts)])]
    for back in (-3, -2, -1):
        for row, x in zip(
            rows, driver.step([(i, [ids[back]]) for i, ids in enumerate(prompts)]), strict=True
        ):
            row.append(x)
    exact = torch.cat([reference(oracle, ids) for ids in prompts])
    theirs = torch.cat([reference(rounded, ids) for ids in prompts]) - exact
    ours = torch.cat([torch.cat(row) for row in rows]) - exact
    # Of the tokens, the one in the middle: a router that turns at a near tie moves one far.
    assert ours.abs().mean(-1).median() <= 1.25 * theirs.abs().mean(-1).median()


def test_a_position_off_by_one_shows(model: tuple[Path, Any]) -> None:
    """But for models that know distances only, which attention takes from where keys lie, or that
    know what came before by their states."""
    folder, oracle = model
    driver = Driver(folder)
    blind = all(spec.alibi is not None for spec in driver.model.specs)
    if driver.model.states and driver.model.specs:
        blind = oracle.config.position_embedding_type != "rope"
    assert (stepwise(driver, oracle, shift=1) > TOLERANCE) is not blind
