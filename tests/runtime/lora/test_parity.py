"""Rows of many adapters in one step say what PEFT says of each alone, and what merged weights say.

The mutations that a parity test of adapters must catch stand at the end of the file.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun.runtime.kernels.native import lora as native
from kvrun.runtime.lora import adapter, rows, sites
from kvrun.runtime.lora.pieces import StoredMatrix
from tests.runtime.driver import Driver
from tests.runtime.lora.adapters import ALL, Adapted, edit, peft_model
from tests.runtime.models import zoo

FORMS = ["joined", "apart", "tiled", "captured"]
FORMS += ["compiled"] if native.available() else []
BASES = [("llama", "v3"), ("llama", "biases"), ("qwen3", "plain"), ("gemma2", "plain")]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1": {"r": 1, "lora_alpha": 3},
    "rank 2": {"r": 2},
    "rank 16": {"r": 16, "lora_alpha": 16},
    "rank 64": {"r": 64, "lora_alpha": 32},
    "rslora": {"r": 8, "lora_alpha": 4, "use_rslora": True},
    "patterns": {
        "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 6, r".*\.0\..*o_proj": 8},
        "alpha_pattern": {"k_proj": 12, "mlp.down_proj": 1},
    },
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "only k": {"target_modules": ["k_proj"]},
    "only up, in layer 1": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [[source.randrange(128) for _ in range(source.randint(3, 9))] for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """(family, variant, kinds) -> folder of the base, folders of adapters, PEFT's logits."""
    known: dict[Any, Any] = {}

    def make(family: str, variant: str, kinds: tuple[str, ...]) -> Any:
        key = family, variant, kinds
        if key not in known:
            folder = tmp_path_factory.mktemp("base")
            base = zoo.make(folder, family, variant)
            texts, expected = prompts(len(kinds) + 1), []
            with torch.no_grad():
                expected.append(base(torch.tensor([texts[-1]])).logits[0])
            folders = []
            for seed, kind in enumerate(kinds):
                model = peft_model(zoo.make(folder, family, variant), seed, **KINDS[kind])
                folders.append(folder / f"adapter {seed}")
                model.save_pretrained(folders[-1], save_embedding_layers=False)
                with torch.no_grad():
                    expected.insert(seed, model(torch.tensor([texts[seed]])).logits[0])
            known[key] = folder, folders, texts, expected
        return known[key]

    return make


def check(made: Any, form: str, atol: float = 1e-4) -> None:
    """Every text with its adapter, all in one step, the base last; then once more in two steps."""
    folder, folders, texts, expected = made
    driver = Adapted(folder)
    for number, path in enumerate(folders):
        driver.bank.register(str(number), str(path))
    names = [*map(str, range(len(folders))), None]
    work = [(n, text, name) for n, (text, name) in enumerate(zip(texts, names, strict=True))]
    for found, wanted in zip(driver.adapted(work, form), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=atol, rtol=1e-4)
    begun = [(100 + n, text[:2], name) for n, text, name in work]
    driver.adapted(begun, form)
    later = [(100 + n, text[2:], name) for n, text, name in reversed(work)]
    for found, wanted in zip(driver.adapted(later, form), reversed(expected), strict=True):
        torch.testing.assert_close(found, wanted[2:], atol=atol, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES, ids="-".join)
def test_three_adapters_and_the_base(made: Any, base: tuple[str, str], form: str) -> None:
    check(made(*base, ("plain", "rslora", "q and v")), form)


@pytest.mark.parametrize("form", FORMS)
def test_every_kind_in_one_step(made: Any, form: str) -> None:
    check(made("llama", "v3", tuple(KINDS)), form)


def test_adapters_matter(made: Any) -> None:
    """Else the comparisons above would prove little."""
    folder, _, texts, expected = made("llama", "v3", tuple(KINDS))
    driver = Driver(folder)
    for number, text in enumerate(texts[:-1]):
        (found,) = driver.step([(number, text)])
        assert (found - expected[number]).abs().max() > 0.05


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_the_same_alone(made: Any, form: str) -> None:
    folder, folders, texts, _ = made("llama", "v3", ("plain", "rslora", "q and v"))
    driver = Adapted(folder)
    for number, path in enumerate(folders):
        driver.bank.register(str(number), str(path))
    names = ["0", "1", "2", None]
    work = [(n, texts[n], names[n]) for n in range(4)]
    together = driver.adapted(work, form)
    for n, text, name in work:
        (alone,) = driver.adapted([(50 + n, text, name)], form)
        torch.testing.assert_close(together[n], alone, atol=1e-5, rtol=1e-5)
        assert torch.equal(together[n].argmax(-1), alone.argmax(-1))


@pytest.mark.parametrize("form", FORMS)
def test_merged_weights_say_the_same(made: Any, form: str, tmp_path: Path) -> None:
    """W + Σ weight · scale · B · A, computed here from the files: a weighted sum of two."""
    folder, folders, texts, _ = made("llama", "v3", ("plain", "rslora"))
    weights = [0.75, -1.5]
    merged = tmp_path / "merged"
    merged.mkdir()
    for file in ("config.json", "model.safetensors"):
        (merged / file).write_bytes((folder / file).read_bytes())
    scales = [8 / 4, 4 / 8**0.5]

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for path, weight, scale in zip(folders, weights, scales, strict=True):
            parts = zoo.load_file(path / "adapter_model.safetensors")
            for name in [n for n in parts if "lora_A" in n]:
                target = name.removeprefix("base_model.model.").replace(".lora_A", "")
                delta = parts[name.replace("lora_A", "lora_B")] @ parts[name]
                tensors[target] = tensors[target] + weight * scale * delta
        return tensors

    zoo.edit_tensors(merged, add)
    (expected,) = Driver(merged).step([(0, texts[0])])
    driver = Adapted(folder)
    for number, path in enumerate(folders):
        driver.bank.register(str(number), str(path))
    choice = [("0", weights[0]), ("1", weights[1])]
    found, base = driver.adapted([(0, texts[0], choice), (1, texts[0], None)], form)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - base).abs().max() > 0.1
    (scaled,) = driver.adapted([(2, texts[0], [("0", 0.0)])], form)
    torch.testing.assert_close(scaled, base, atol=1e-5, rtol=1e-5)


def test_old_and_other_names(made: Any, tmp_path: Path) -> None:
    """`.default` in names, and none of PEFT's prefixes."""
    folder, folders, texts, expected = made("llama", "v3", ("plain", "rslora", "q and v"))
    for form, rename in (
        ("default", lambda name: name.replace(".weight", ".default.weight")),
        ("bare", lambda name: name.removeprefix("base_model.model.")),
        ("short", lambda name: name.removeprefix("base_model.model.model.")),
        ("longer", lambda name: "base_model.model.outer." + name.removeprefix("base_model.model.")),
    ):
        copy = tmp_path / form
        copy.mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (copy / file).write_bytes((folders[0] / file).read_bytes())
        edit(copy, lambda tensors, rename=rename: {rename(n): t for n, t in tensors.items()})
        driver = Adapted(folder)
        driver.bank.register(form, str(copy))
        (found,) = driver.adapted([(0, texts[0], form)], "joined")
        torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=1e-4)


def test_all_targets_are_in_the_model(made: Any) -> None:
    folder, *_ = made("llama", "v3", ("plain", "rslora", "q and v"))
    names = sites.Sites(Driver(folder).model.products).names
    ends = {name.rsplit(".", 1)[-1] for name in names}
    norms = {"input_layernorm", "post_attention_layernorm", "norm"}
    assert ends == {*ALL, *norms, "embed_tokens", "lm_head"}


def _no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "StoredMatrix", lambda stored, scale: StoredMatrix(stored))


def _no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter.math, "sqrt", lambda rank: rank)


def _no_patterns(monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter._by_pattern

    def wrong(config: Any, key: str, module: str, otherwise: Any) -> Any:
        return otherwise if key == "alpha_pattern" else real(config, key, module, otherwise)

    monkeypatch.setattr(adapter, "_by_pattern", wrong)


def _first_adapter_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows.tiled

    def wrong(of_row: Any, height: int) -> Any:
        listed, tiles = real(of_row, height)
        tiles[:, 0] = tiles[0, 0]
        return listed, tiles

    monkeypatch.setattr("tests.runtime.lora.adapters.tiled", wrong)


@pytest.mark.parametrize("mutate", [_no_scale, _no_root, _no_patterns, _first_adapter_for_all])
def test_mutations_are_seen(made: Any, mutate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ingredients = made("llama", "v3", tuple(KINDS))
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(ingredients, "tiled")
