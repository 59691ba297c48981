"""Adapters that are more than A and B on products of layers say what PEFT says of them.

Every row of a batch has another kind of adapter, or none; each in a step with all others, then
again in two steps, as prompts and single tokens mixed.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvrun.runtime.lora import settle as settling
from kvrun.runtime.lora.beyond import Beyond, Change
from tests.runtime.lora.adapters import Adapted, peft_model, ready, rows_of, save
from tests.runtime.lora.test_parity import FORMS, prompts
from tests.runtime.models import zoo
from tests.runtime.models.test_ranks import Sum, Threads

EMBED, HEAD = "embed_tokens", "lm_head"
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "embedding": {"target_modules": ["q_proj", EMBED]},
    "only the embedding": {"target_modules": [EMBED], "r": 2},
    "head": {"target_modules": [HEAD, "down_proj"], "use_rslora": True},
    "saved": {"modules_to_save": [EMBED, HEAD], "target_modules": ["q_proj"]},
    "tokens": {"trainable_token_indices": [5, 99, 17], "target_modules": ["q_proj"]},
    "tokens by module": {"trainable_token_indices": {EMBED: [*range(2, 128, 2)]},
                         "target_modules": ["o_proj"]},
    "saved product": {"modules_to_save": ["o_proj", "k_proj"], "target_modules": ["q_proj"]},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "v_proj", "o_proj", "up_proj"]},
    "dora everywhere": {"use_dora": True, "target_modules": [EMBED, HEAD, "k_proj", "down_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "o_proj", "lm_head"]},
    "biases": {"bias": "all", "target_modules": ["q_proj", "v_proj"]},
    "norms": {"modules_to_save": ["input_layernorm", "norm"], "target_modules": ["q_proj"]},
    "own biases": {"bias": "lora_only", "target_modules": ["q_proj", "down_proj"]},
    "dora and biases": {"use_dora": True, "bias": "all", "target_modules": ["v_proj", "o_proj"]},
}  # fmt: skip
CONV1D = {"fan_in_fan_out": True}
GPT2: dict[str, dict[str, Any]] = {
    "gpt2 dora": {"use_dora": True, "target_modules": ["c_attn", "c_proj", "wte"], **CONV1D},
    "gpt2 saved": {"modules_to_save": ["c_attn", "wte"], "target_modules": ["c_fc"], **CONV1D},
    "gpt2 all biases": {"bias": "all", "target_modules": ["c_attn"], **CONV1D},
    "gpt2 biases": {"bias": "lora_only", "target_modules": ["c_attn", "c_proj"], **CONV1D},
}
SOME = ["embedding", "saved", "dora everywhere"]
BASES = {
    ("llama", "biases"): list(KINDS),
    ("llama", "v3.1"): [
        *SOME,
        "head",
        "dora",
        "tokens",
        "tokens by module",
    ],  # one matrix is embedding and head
    ("gemma2", "plain"): [*SOME, "four norms"],  # embeddings are scaled, logits are capped
    ("gpt_neox", "pythia"): ["parallel norms"],
    ("opt", "350m"): ["norms behind"],
    ("gpt2", "plain"): list(GPT2),
    ("phi3", "4k"): ["phi3 dora"],
}
KINDS |= GPT2
KINDS["four norms"] = {"modules_to_save": [
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
    "post_feedforward_layernorm", "norm"], "target_modules": ["q_proj"]}  # fmt: skip
KINDS["parallel norms"] = {"bias": "all", "target_modules": ["query_key_value"],
                           "modules_to_save": ["post_attention_layernorm"]}  # fmt: skip
KINDS["norms behind"] = {"bias": "all", "target_modules": ["q_proj"],
                         "modules_to_save": ["self_attn_layer_norm"]}  # fmt: skip
KINDS["phi3 dora"] = {"use_dora": True, "target_modules": ["qkv_proj", "gate_up_proj"]}
Made = tuple[Path, list[Path], list[list[int]], list[torch.Tensor]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Made]:
    """(family, variant) -> the base's folder, the adapters', a text for each and one for the base,
    and what transformers and PEFT make of these."""
    known: dict[tuple[str, str], Made] = {}

    def make(family: str, variant: str) -> Made:
        key = family, variant
        if key not in known:
            folder = tmp_path_factory.mktemp("base")
            kinds, base = BASES[key], zoo.make(folder, family, variant)
            texts, folders, expected = prompts(len(kinds) + 1), [], []
            for seed, kind in enumerate(kinds):
                model = peft_model(deepcopy(base), seed, **KINDS[kind])
                folders.append(folder / f"adapter {seed}")
                save(model, folders[-1])
                with torch.no_grad():
                    expected.append(model(torch.tensor([texts[seed]])).logits[0])
            with torch.no_grad():
                expected.append(base(torch.tensor([texts[-1]])).logits[0])
            known[key] = folder, folders, texts, expected
        return known[key]

    return make


def check(ingredients: Made, form: str, **options: Any) -> None:
    """All texts in one step; then in two, so that whole prompts stand beside single tokens."""
    folder, folders, texts, expected = ingredients
    driver = Adapted(folder, **options)
    for number, path in enumerate(folders):
        driver.bank.register(str(number), str(path))
    names = [*map(str, range(len(folders))), None]
    work = [(n, text, name) for n, (text, name) in enumerate(zip(texts, names, strict=True))]
    close: dict[str, float] = {"atol": 1e-4, "rtol": 1e-4}
    for found, wanted in zip(driver.adapted(work, form), expected, strict=True):
        torch.testing.assert_close(found, wanted, **close)
    cuts = [2 if n % 2 else -1 for n in range(len(work))]
    begun = [(100 + n, text[: cuts[n]], name) for n, text, name in work]
    ended = [(100 + n, text[cuts[n] :], name) for n, text, name in reversed(work)]
    first, second = driver.adapted(begun, form), reversed(driver.adapted(ended, form))
    for one, two, wanted in zip(first, second, expected, strict=True):
        torch.testing.assert_close(torch.cat((one, two)), wanted, **close)


@pytest.mark.parametrize("base", BASES, ids="-".join)
def test_all_kinds_in_one_batch(made: Any, base: tuple[str, str]) -> None:
    check(made(*base), "apart")


@pytest.mark.parametrize("form", sorted({*FORMS} - {"apart", "captured"}))
def test_other_forms_of_rows(made: Any, form: str) -> None:
    check(made("llama", "biases"), form)


@pytest.mark.parametrize("base", [("llama", "biases"), ("gpt2", "plain")], ids="-".join)
def test_two_ranks(made: Any, base: tuple[str, str]) -> None:
    """Norms and sums of both, biases once."""
    ingredients, total = made(*base), Sum()
    for error in total.both(
        lambda rank: check(ingredients, "apart", group=Threads(rank, sum=total))
    ):
        if error is not None:
            raise error


@torch.inference_mode()
def test_states_and_logits_of_some_rows(made: Any) -> None:
    """What is wanted of a step are a few of its rows: the adapter of each is found again."""
    folder, folders, texts, expected = made("llama", "biases")
    numbers = [list(KINDS).index(kind) for kind in ("norms", "head", "saved", "dora everywhere")]
    driver = Adapted(folder)
    for number in numbers:
        driver.bank.register(str(number), str(folders[number]))
    slots: list[int] = []
    for number in numbers:
        adapter = driver.bank.find(str(number))
        assert adapter
        slots += [ready(driver.bank, adapter).slot] * len(texts[number])
    batch = driver.batch([(n, texts[n]) for n in numbers])
    batch.lora = rows_of(driver.bank, slots, "apart")
    every = driver.model(batch)
    batch.last_rows = batch.state_rows = batch.cu_seqlens[1:].flip(0) - 1
    logits = driver.model(batch)
    torch.testing.assert_close(logits, every[batch.last_rows], atol=1e-5, rtol=1e-5)
    wanted = torch.stack([expected[n][-1] for n in reversed(numbers)])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert batch.states is not None
    torch.testing.assert_close(head @ batch.states[-1], wanted[-1], atol=1e-4, rtol=1e-4)


MUTATIONS: dict[str, tuple[Any, str, Any]] = {
    "embeddings stay": (Beyond, "embed", lambda *_: None),
    "the head stays": (Beyond, "head", lambda self, site, x, y, *_: y),
    "matrices stay": (Change, "replace", lambda *_: None),
    "norms stay": (Beyond, "norms", lambda *_: []),
    "nothing is scaled": (Change, "finish", lambda self, y, **_: FINISH(self, y, scaled=False)),
    "nothing is shifted": (Change, "finish", lambda self, y, **_: FINISH(self, y, shifted=False)),
    "norms of the base alone": (settling, "_norms", lambda resident, slot, site, extra, base: NORMS(
        resident, slot, site, replace(extra, magnitudes=frozenset()), base)),
}  # fmt: skip
FINISH, NORMS = Change.finish, settling._norms


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_seen(made: Any, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made("llama", "biases")
    monkeypatch.setattr(*MUTATIONS[mutation])
    with pytest.raises(AssertionError):
        check(made("llama", "biases"), "apart")
