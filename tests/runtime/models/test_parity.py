"""Every family of the folder gives the logits that transformers gives, and mistakes would show."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun import folder as registry
from kvrun.runtime.layers.embedding import Embedding
from kvrun.runtime.layers.norm import HeadNorm
from kvrun.runtime.models import llama, qwen3
from kvrun.runtime.quant import dense
from tests.runtime.driver import Driver
from tests.runtime.models import zoo

TOLERANCE = 1e-4  # the promise is 1e-3; what is measured lies below 2e-5
LONG, SHORT = 23, 9  # tokens; longer than the windows


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Path, Any]]:
    made: dict[tuple[str, str], tuple[Path, Any]] = {}

    def get(family: str, variant: str) -> tuple[Path, Any]:
        if (family, variant) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{variant}")
            made[family, variant] = folder, zoo.make(folder, family, variant)
        return made[family, variant]

    return get


@pytest.fixture(params=list(zoo.variants()), ids="-".join)
def model(
    request: pytest.FixtureRequest, models: Callable[[str, str], tuple[Path, Any]]
) -> tuple[Path, Any]:
    return models(*request.param)


def prompt(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(128) for _ in range(length)]


@torch.inference_mode()
def reference(oracle: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = oracle(torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits


def worst(found: list[torch.Tensor], expected: torch.Tensor) -> float:
    return float((torch.cat(found) - expected).abs().max())


def stepwise(driver: Driver, oracle: Any, shift: int = 0) -> float:
    """Largest difference over a ragged prefill and the steps that follow it, token by token."""
    a, b = prompt(1, LONG), prompt(2, SHORT)
    rows = [[x] for x in driver.step([(0, a[:-4]), (1, b[:-4])])]
    for back in range(-4, 0):
        for row, logits in zip(
            rows, driver.step([(0, [a[back]]), (1, [b[back]])], shift), strict=True
        ):
            row.append(logits)
    return max(worst(rows[0], reference(oracle, a)), worst(rows[1], reference(oracle, b)))


def test_every_family_of_the_folder_is_compared() -> None:
    assert set(zoo.VARIANTS) == set(registry.names("kvrun.runtime.models"))


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
    with torch.inference_mode():
        expected = oracle.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(4, 12, dtype=torch.int64),
            max_new_tokens=64,
            do_sample=False,
        )[:, 12:].tolist()
    work = list(enumerate(prompts))
    found: list[list[int]] = [[] for _ in prompts]
    for _ in range(64):
        logits = driver.step(work)
        work = [(i, [int(rows[-1].argmax())]) for i, rows in enumerate(logits)]
        for i, ids in work:
            found[i] += ids
    assert found == expected


def test_bfloat16_is_as_near_to_float32_as_transformers_is(model: tuple[Path, Any]) -> None:
    folder, oracle = model
    ids = prompt(6, LONG)
    exact = reference(oracle, ids)
    rounded = type(oracle).from_pretrained(folder, dtype=torch.bfloat16)
    theirs = (reference(rounded, ids) - exact).abs().mean()
    driver = Driver(folder, dtype=torch.bfloat16)
    found = driver.step([(0, ids[:-3])]) + [driver.step([(0, [i])])[0] for i in ids[-3:]]
    ours = (torch.cat(found) - exact).abs().mean()
    assert ours <= 1.25 * theirs


# Mistakes that must show. Each changes what kvrun reads, or replaces a part of it.
Tensors = dict[str, torch.Tensor]


def swap_rows(name: str, size: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        for key in [k for k in tensors if name in k]:
            first, second, rest = tensors[key][:size], tensors[key][size : 2 * size], 2 * size
            tensors[key] = torch.cat([second, first, tensors[key][rest:]])
        return tensors

    return change


def swap_kv_heads(size: int) -> Callable[[Tensors], Tensors]:
    k, v = swap_rows("k_proj", size), swap_rows("v_proj", size)
    return lambda tensors: v(k(tensors))


def swap_names(first: str, second: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        flip = {first: second, second: first}
        return {
            next((k.replace(a, b) for a, b in flip.items() if a in k), k): t
            for k, t in tensors.items()
        }

    return change


def minus_one(tensors: Tensors) -> Tensors:
    return {k: t - 1 if "norm" in k else t for k, t in tensors.items()}


def no_biases(tensors: Tensors) -> Tensors:
    return {k: t * 0 if k.endswith("bias") else t for k, t in tensors.items()}


def scale_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "Embedding", lambda *args, scale: Embedding(*args))


def no_head_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def read_and_drop(*args: Any) -> None:
        HeadNorm(*args)

    monkeypatch.setattr(qwen3, "HeadNorm", read_and_drop)


THETA = {"rope_type": "default", "rope_theta": 10100.0}
CONFIG_MUTATIONS = {
    "rope theta +1 %": ("llama", "v2", {"rope_parameters": THETA}),
    "eps × 10": ("llama", "v2", {"rms_norm_eps": 1e-4}),
    "llama3 scaling off": ("llama", "v3.1", {"rope_parameters": {"rope_theta": 500000.0}}),
    "linear scaling off": ("llama", "linear", {"rope_parameters": {"rope_theta": 10000.0}}),
    "yarn off": ("llama", "yarn", {"rope_parameters": {"rope_theta": 10000.0}}),
    "window off, qwen3": ("qwen3", "window", {"use_sliding_window": False}),
    "window off": ("gemma2", "plain", {"sliding_window": 4096}),
    "window on all layers": ("gemma2", "plain", {"layer_types": ["sliding_attention"] * 2}),
    "window one too wide": ("gemma2", "plain", {"sliding_window": 7}),
    "softcap off": ("gemma2", "plain", {"attn_logit_softcapping": None}),
    "final softcap off": ("gemma2", "plain", {"final_logit_softcapping": None}),
    "attention scale": ("gemma2", "plain", {"query_pre_attn_scalar": 16}),
    "exact gelu": ("gemma2", "plain", {"hidden_activation": "gelu"}),
}
TENSOR_MUTATIONS = {
    "swapped heads": ("llama", "v2", swap_rows("q_proj", 16)),
    "gate and up swapped": ("llama", "v2", swap_names("gate_proj", "up_proj")),
    "wrong KV group": ("llama", "v3", swap_kv_heads(16)),
    "biases lost": ("llama", "biases", no_biases),
    "norms swapped": ("llama", "v2", swap_names("input_layernorm", "post_attention_layernorm")),
    "q and k norms swapped": ("qwen3", "plain", swap_names("q_norm", "k_norm")),
    "norm offset 0": ("gemma2", "plain", minus_one),
}
CODE_MUTATIONS = {
    "qk-norm off": ("qwen3", "plain", no_head_norm),
    "embedding scale 1": ("gemma2", "plain", scale_one),
}


@pytest.fixture
def mutant(
    models: Callable[[str, str], tuple[Path, Any]], tmp_path: Path
) -> Callable[[str, str], tuple[Path, Any]]:
    def copy(family: str, variant: str) -> tuple[Path, Any]:
        folder, oracle = models(family, variant)
        return Path(shutil.copytree(folder, tmp_path / "mutant")), oracle

    return copy


@pytest.mark.parametrize("name", CONFIG_MUTATIONS)
def test_config_mutation_shows(name: str, mutant: Callable[..., tuple[Path, Any]]) -> None:
    family, variant, changes = CONFIG_MUTATIONS[name]
    folder, oracle = mutant(family, variant)
    zoo.edit_config(folder, **changes)
    assert stepwise(Driver(folder), oracle) > TOLERANCE


@pytest.mark.parametrize("name", TENSOR_MUTATIONS)
def test_tensor_mutation_shows(name: str, mutant: Callable[..., tuple[Path, Any]]) -> None:
    family, variant, change = TENSOR_MUTATIONS[name]
    folder, oracle = mutant(family, variant)
    zoo.edit_tensors(folder, change)
    assert stepwise(Driver(folder), oracle) > TOLERANCE


@pytest.mark.parametrize("name", CODE_MUTATIONS)
def test_code_mutation_shows(
    name: str, mutant: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    family, variant, replace = CODE_MUTATIONS[name]
    folder, oracle = mutant(family, variant)
    replace(monkeypatch)
    assert stepwise(Driver(folder), oracle) > TOLERANCE


def test_a_position_off_by_one_shows(model: tuple[Path, Any]) -> None:
    folder, oracle = model
    assert stepwise(Driver(folder), oracle, shift=1) > TOLERANCE
