"""Adapters of experts say what PEFT says of them, whichever way their tensors are stored."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrun.errors import BadCheckpoint, InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.checkpoint import Product, Shard
from kvrun.runtime.lora.adapter import AdapterFolder
from kvrun.runtime.lora.fuse import fuse
from kvrun.runtime.lora.sites import Sites
from kvrun.runtime.parallel import Group
from tests.runtime.driver import Driver
from tests.runtime.lora.adapters import Adapted, edit, peft_model, save, write
from tests.runtime.lora.test_kinds import Made, check
from tests.runtime.lora.test_parity import prompts
from tests.runtime.models import zoo
from tests.runtime.models.test_ranks import Sum, Threads

UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
GRANITE, LLAMA = ("block_sparse_moe.experts", "feed_forward.experts")
FAMILIES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "mixtral": ("plain", [
        {"target_parameters": [UP, DOWN], "target_modules": ["q_proj"]},
        {"target_parameters": [DOWN], "target_modules": [], "r": 2, "use_rslora": True},
        {"target_modules": ["o_proj"]},
    ]),
    "qwen3_moe": ("plain", [{"target_parameters": [UP], "target_modules": []}]),
    "gpt_oss": ("plain", [{"target_parameters": [UP, DOWN], "target_modules": []}]),
    "llama4_text": ("scout", [
        {"target_parameters": [f"{LLAMA}.gate_up_proj", f"{LLAMA}.down_proj"],
         "target_modules": []},
    ]),
    "granitemoe": ("plain", [
        {"target_parameters": [f"{GRANITE}.gate_up_proj", f"{GRANITE}.down_proj"],
         "target_modules": []},
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    known: dict[str, Made] = {}

    def make(family: str) -> Made:
        if family not in known:
            variant, kinds = FAMILIES[family]
            folder = tmp_path_factory.mktemp("base")
            base = zoo.make(folder, family, variant)
            texts, folders, expected = prompts(len(kinds) + 1), [], []
            for seed, kind in enumerate(kinds):
                model = peft_model(deepcopy(base), seed, **kind)
                folders.append(folder / f"adapter {seed}")
                save(model, folders[-1])
                with torch.no_grad():
                    expected.append(model(torch.tensor([texts[seed]])).logits[0])
            with torch.no_grad():
                expected.append(base(torch.tensor([texts[-1]])).logits[0])
            known[family] = folder, folders, texts, expected
        return known[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_experts(made: Any, family: str) -> None:
    check(made(family), "apart")
    folder, folders, texts, expected = made(family)
    (base,) = Adapted(folder).adapted([(0, texts[0], None)], "apart")
    assert (base - expected[0]).abs().max() > 0.05
    assert len(folders) == len(FAMILIES[family][1])


def test_matrices_of_single_experts(made: Any, tmp_path: Path) -> None:
    """As older files have them: some experts, some of their parts; what fusing makes of these."""
    folder, _, texts, _ = made("mixtral")
    shapes = {
        "block_sparse_moe.experts.0.w1": (96, 64), "block_sparse_moe.experts.0.w3": (96, 64),
        "block_sparse_moe.experts.0.w2": (64, 96), "block_sparse_moe.experts.3.w3": (96, 64),
        "block_sparse_moe.experts.4.w2": (64, 96), "block_sparse_moe.gate": (5, 64),
    }  # fmt: skip
    whole = {f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in shapes.items()}
    write(tmp_path / "adapter", whole, rank_pattern={r"3\.w3": 6}, spread=0.3)
    patterned = {name: shape for name, shape in whole.items() if "3.w3" in name}
    write(tmp_path / "other", patterned, 6, spread=0.3)
    more = load_file(tmp_path / "other" / "adapter_model.safetensors")
    edit(tmp_path / "adapter", lambda tensors: {**tensors, **more})
    fuse(folder, tmp_path / "adapter", tmp_path / "fused")
    total = Sum()
    for group in (Group(), None):

        def compare(rank: int, group: Any = group) -> None:
            own = group or Threads(rank, sum=total)
            driver = Adapted(folder, group=own)
            driver.bank.register("it", str(tmp_path / "adapter"))
            found, base = driver.adapted([(0, texts[0], "it"), (1, texts[0], None)], "apart")
            (expected,) = Driver(tmp_path / "fused", group=own).step([(0, texts[0])])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert (found - base).abs().max() > 0.05

        for error in [compare(0)] if group else total.both(compare):
            if error is not None:
                raise error


SITES = Sites(
    [
        Product((Shard("model.layers.0.mlp.experts.gate_up_proj", 12, 8),), "experts", 3,
                ("gate_proj", "up_proj")),
        Product((Shard("model.layers.0.mlp.experts.down_proj", 8, 6),), "experts", 3,
                ("down_proj",)),
    ]
)  # fmt: skip
STACK = "model.layers.0.mlp.experts"
REFUSED: dict[str, tuple[dict[str, tuple[int, ...]], type[KvrunError], str]] = {
    "another width": (
        {f"{STACK}.lora_A.weight": (12, 9), f"{STACK}.lora_B.weight": (12, 12)},
        BadCheckpoint, "none of the model's experts",
    ),
    "fewer experts": (
        {f"{STACK}.lora_A.weight": (8, 8), f"{STACK}.lora_B.weight": (12, 8)},
        BadCheckpoint, "not one of 3 experts",
    ),
    "an expert too many": (
        {f"{STACK}.3.up_proj.lora_A.weight": (4, 8), f"{STACK}.3.up_proj.lora_B.weight": (6, 4)},
        BadCheckpoint, "the model has 3 experts",
    ),
    "half of another size": (
        {f"{STACK}.0.up_proj.lora_A.weight": (4, 8), f"{STACK}.0.up_proj.lora_B.weight": (12, 4)},
        BadCheckpoint, "none of the model's experts",
    ),
    "a matrix in its place": (
        {f"{STACK}.0.up_proj.weight": (6, 8)}, Unsupported, "experts take A and B; it has weight",
    ),
    "only an A": (
        {f"{STACK}.lora_A.weight": (12, 8)}, Unsupported, "half of a pair",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(tmp_path: Path, kind: str) -> None:
    shapes, error, words = REFUSED[kind]
    write(tmp_path, {"x": (1, 1)})
    tensors = {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(error, match=words):
        AdapterFolder(tmp_path, SITES)


def test_no_weighted_sums_of_experts(made: Any) -> None:
    folder, folders, _, _ = made("mixtral")
    driver = Adapted(folder)
    for number, path in enumerate(folders):
        driver.bank.register(str(number), str(path))
    with pytest.raises(InvalidRequest, match="cannot be a part of a weighted sum"):
        driver.bank.find([("0", 0.5), ("2", 0.5)])
    assert driver.bank.adapters[0].source.layout.ranks == (4,)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_two_ranks(made: Any, family: str) -> None:
    ingredients, total = made(family), Sum()
    for error in total.both(
        lambda rank: check(ingredients, "apart", group=Threads(rank, sum=total))
    ):
        if error is not None:
            raise error
