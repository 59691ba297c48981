"""Adapters on the products of latent attention, kv_b included, say what PEFT says."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runtime.driver import Driver
from tests.runtime.lora.adapters import Adapted, peft_model, save
from tests.runtime.lora.test_parity import FORMS, prompts
from tests.runtime.models import zoo

LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
KINDS: list[dict[str, Any]] = [
    {"target_modules": LATENT},
    {"target_modules": ["kv_b_proj"]},
    {"target_modules": ["kv_a_proj_with_mqa"]},
    {"target_modules": LATENT, "use_dora": True},
    {"target_modules": ["kv_b_proj"], "lora_bias": True},
]
Made = tuple[Path, list[Path], list[list[int]], list[torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The base's folder, the adapters', a text for each and one more, and PEFT's logits."""
    folder = tmp_path_factory.mktemp("base")
    texts, folders, expected = prompts(len(KINDS) + 1), [], []
    base = zoo.make(folder, "deepseek_v3", "plain")
    for seed, kind in enumerate(KINDS):
        model = peft_model(deepcopy(base), seed, r=3 + 8 * (seed % 3), **kind)
        folders.append(folder / f"adapter {seed}")
        save(model, folders[-1])
        with torch.no_grad():
            expected.append(model(torch.tensor([texts[seed]])).logits[0])
    (base_logits,) = Driver(folder).step([(0, texts[-1])])
    return folder, folders, texts, [*expected, base_logits]


@pytest.mark.parametrize("form", FORMS)
def test_adapters_of_latent_attention(made: Made, form: str) -> None:
    folder, folders, texts, expected = made
    driver = Adapted(folder)
    for number, path in enumerate(folders):
        driver.bank.register(str(number), str(path))
    names = [*map(str, range(len(folders))), None]
    work = [(n, text, name) for n, (text, name) in enumerate(zip(texts, names, strict=True))]
    for found, wanted in zip(driver.adapted(work, form), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    driver.adapted([(100 + n, text[:2], name) for n, text, name in work], form)
    later = driver.adapted([(100 + n, text[2:], name) for n, text, name in work], form)
    for found, wanted in zip(later, expected, strict=True):
        torch.testing.assert_close(found, wanted[2:], atol=1e-4, rtol=1e-4)


def test_the_adapter_of_kv_b_matters(made: Made) -> None:
    folder, _, texts, expected = made
    (base,) = Driver(folder).step([(0, texts[1])])
    assert (base - expected[1]).abs().max() > 0.05
