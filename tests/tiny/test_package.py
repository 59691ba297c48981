"""The built-in model as it is shipped: complete, small, loadable, as good as its report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).parents[2] / "kvrun" / "tiny"
GOLDEN = Path(__file__).parents[1] / "golden" / "tiny"
ADAPTERS = ("sql", "json", "pirate")


def load() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def model() -> Any:
    return load()


def records(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return found


@torch.inference_mode()
def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    out = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        do_sample=False,
        max_new_tokens=count,
    )
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def test_all_files_are_there_and_small() -> None:
    names = {p.relative_to(TINY).as_posix() for p in TINY.rglob("*") if p.is_file()}
    wanted = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "README.md",
        "eval.json",
        "transcript.md",
    }
    for adapter in ADAPTERS:
        wanted |= {f"adapters/{adapter}/adapter_{n}" for n in ("config.json", "model.safetensors")}
    assert wanted <= names
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) <= 20_000_000


def test_it_has_seven_to_nine_million_parameters(model: Any) -> None:
    assert 7_000_000 <= sum(p.numel() for p in model.parameters()) <= 9_000_000


def test_answers_a_question_through_the_chat_template(model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 12 + 30?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(greedy(model, ids, 20), skip_special_tokens=True) == "12 + 30 = 42."


def test_tokenizer_gives_back_any_text_and_keeps_digits_apart() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    for text in ("naïve 雪 ☃ 12345", "  two  spaces\n\ttab", "plain words, marks!"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer("12345", add_special_tokens=False)["input_ids"]) == 5
    assert len(tokenizer) == 4096
    assert tokenizer.convert_tokens_to_ids("<|end|>") == tokenizer.eos_token_id == 7


def test_report_meets_its_gates() -> None:
    report = json.loads((TINY / "eval.json").read_text(encoding="utf-8"))
    missed = set()
    gated = 0
    for name, row in report["scores"].items():
        if "gate" not in row:
            continue
        gated += 1
        low_is_good = name == "sql by base"
        met = row["score"] <= row["gate"] if low_is_good else row["score"] >= row["gate"]
        missed |= set() if met else {name}
    assert gated >= 30
    assert sorted(missed) == report["missed"]
    assert not missed


def test_report_is_about_these_files() -> None:
    report = json.loads((TINY / "eval.json").read_text(encoding="utf-8"))
    assert report["bytes"] == {
        p.relative_to(TINY).as_posix(): p.stat().st_size
        for p in sorted(TINY.rglob("*.safetensors"))
    }


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapter_changes_the_answer_as_recorded(adapter: str) -> None:
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(load(), TINY / "adapters" / adapter).eval()
    mine = [r for r in records("adapters") if r["adapter"] == adapter]
    base = {json.dumps(r["messages"]): r for r in records("adapters") if r["adapter"] is None}
    assert mine
    for record in mine[:2]:
        out = greedy(adapted, record["prompt_ids"], len(record["output_ids"]))
        assert out == record["output_ids"]
        other = base.get(json.dumps(record["messages"]))
        assert other is None or other["output_ids"] != out


def test_golden_files_are_many_and_far_from_ties() -> None:
    found = [r for name in ("chat", "raw", "adapters") for r in records(name)]
    assert len(found) >= 30
    assert {r["adapter"] for r in found} == {None, *ADAPTERS}
    assert all(r["min_gap"] >= 0.1 and r["prompt_ids"][0] == 1 for r in found)


def test_golden_outputs_are_this_models(model: Any) -> None:
    for record in records("chat")[::4] + records("raw"):
        out = greedy(model, record["prompt_ids"], len(record["output_ids"]))
        assert out == record["output_ids"], record["name"]
