"""Log-probabilities of prompts: the model's own, however the prompt was computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvrun import LLM, SamplingParams
from kvrun.hub.local import resolve

GOLDEN = Path(__file__).parents[2] / "golden" / "tiny"
PROMPTS: list[list[int]] = [
    record["prompt_ids"] for record in json.loads((GOLDEN / "chat.json").read_text())[:10]
]
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks": {"max_num_batched_tokens": 5, "block_size": 2},
    "no prefix cache": {"prefix_caching": False},
    "preempted": {"kv_memory": 130 * 2 * 2 * 64 * 4 * 9, "max_model_len": 100, "block_size": 2},
}
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=3)


@pytest.fixture(scope="module")
def expected() -> list[torch.Tensor]:
    """Log-probabilities [prompt - 1, vocab] of every prompt, by transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(resolve("tiny"), dtype=torch.float32).eval()
    with torch.inference_mode():
        return [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in PROMPTS]


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_they_are_the_models_own(options: dict[str, Any], expected: list[torch.Tensor]) -> None:
    with LLM("tiny", dtype="float32", **options) as llm:
        plain = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))
        before = llm.stats()
        outputs = llm.generate(PROMPTS, PARAMS)
        stats = llm.stats()
    assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
    assert stats.prefix_hit_tokens == before.prefix_hit_tokens  # every token had to be computed
    assert (stats.preemptions > before.preemptions) == ("kv_memory" in options)
    for ids, output, wanted in zip(PROMPTS, outputs, expected, strict=True):
        entries = output.prompt_logprobs
        assert entries is not None
        assert [entry.token_id for entry in entries] == ids[1:]
        for entry, row in zip(entries, wanted, strict=True):
            assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-3)
            best = row.topk(3)
            assert [value for _, value in entry.top] == pytest.approx(
                best.values.tolist(), abs=1e-3
            )
            assert entry.top[0][0] == int(best.indices[0])


def test_who_does_not_ask_gets_none_and_may_use_the_cache() -> None:
    with LLM("tiny", dtype="float32", block_size=2) as llm:
        first, second = llm.generate(
            [PROMPTS[0], PROMPTS[0][:-1]],
            [PARAMS, SamplingParams(temperature=0, max_tokens=1)],
        )
        assert first.prompt_logprobs
        assert second.prompt_logprobs is None
        (again,) = llm.generate([PROMPTS[0]], SamplingParams(temperature=0, max_tokens=12))
        assert again.token_ids == first.token_ids[: len(again.token_ids)]
        assert llm.stats().prefix_hit_tokens > 0


def test_several_answers_share_one_prompt() -> None:
    params = SamplingParams(n=3, seed=1, max_tokens=4, prompt_logprobs=0, ignore_eos=True)
    with LLM("tiny", dtype="float32", block_size=2, max_num_batched_tokens=6) as llm:
        (output,) = llm.generate([PROMPTS[1]], params)
        # The others have its blocks, and compute at most what is left of the last.
        assert llm.stats().prompt_tokens <= len(PROMPTS[1]) + 2 * 2
    assert output.prompt_logprobs
    assert len(output.prompt_logprobs) == len(PROMPTS[1]) - 1
    assert output.prompt_logprobs[0].top == []
    assert len(output.choices) == 3


def test_a_prompt_of_one_token_has_nothing_to_tell() -> None:
    with LLM("tiny", dtype="float32") as llm:
        (output,) = llm.generate([[5]], SamplingParams(max_tokens=1, prompt_logprobs=1))
    assert output.prompt_logprobs == []


def test_a_long_prompt_comes_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrun.runtime.engine.sequence.SCORED_AT_ONCE", 7)
    monkeypatch.setattr("kvrun.runtime.sampling.sampler.SCORE_SLICE", 3)
    long = [token for ids in PROMPTS for token in ids][:200]
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=2)
    with LLM("tiny", dtype="float32") as llm:
        sliced = llm.generate([long], params)[0].prompt_logprobs
        assert llm.stats().steps >= len(long) // 7
        monkeypatch.undo()
        whole = llm.generate([long], params)[0].prompt_logprobs
    assert sliced is not None
    assert whole is not None
    assert [e.token_id for e in sliced] == [e.token_id for e in whole] == long[1:]
    assert [e.logprob for e in sliced] == pytest.approx([e.logprob for e in whole], abs=1e-4)
