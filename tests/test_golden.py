"""The built-in model through the engine says what transformers said, token for token.

The records were made by transformers in fp32 on CPU (recipes/tiny/golden.py) from prompts in which
the best token is never close to the second, so that every backend, batch and cache must agree.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kvrun import LLM, SamplingParams

FOLDER = Path(__file__).parent / "golden" / "tiny"
RECORDS: list[dict[str, Any]] = [
    record
    for name in ("chat", "raw")
    for record in json.loads((FOLDER / f"{name}.json").read_text())
]
OPTIONS: dict[str, dict[str, Any]] = {
    "all at once": {},
    "no prefix cache": {"prefix_caching": False},
    "small chunks and blocks": {"max_num_batched_tokens": 16, "max_num_seqs": 8, "block_size": 2},
    "preempted": {"kv_memory": 600 * 2 * 2 * 64 * 4 * 9, "max_model_len": 256, "max_num_seqs": 32},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_golden_outputs(options: dict[str, Any]) -> None:
    params = [SamplingParams(temperature=0, max_tokens=len(r["output_ids"])) for r in RECORDS]
    with LLM("tiny", dtype="float32", **options) as llm:
        outputs = llm.generate([r["prompt_ids"] for r in RECORDS], params)
        stats = llm.stats()
    wrong = [
        (record["name"], output.text, record["text"])
        for record, output in zip(RECORDS, outputs, strict=True)
        if output.token_ids != record["output_ids"]
    ]
    assert not wrong
    assert len(RECORDS) >= 30
    assert (stats.preemptions > 0) == ("kv_memory" in options)


def test_golden_outputs_with_adapters() -> None:
    """Three adapters and the base in one batch; the records were made with PEFT, one by one."""
    records = json.loads((FOLDER / "adapters.json").read_text())
    params = [SamplingParams(temperature=0, max_tokens=len(r["output_ids"])) for r in records]
    with LLM("tiny", dtype="float32") as llm:
        prompts, adapters = ([r[key] for r in records] for key in ("prompt_ids", "adapter"))
        outputs = llm.generate(prompts, params, adapter=adapters)
    assert [o.token_ids for o in outputs] == [r["output_ids"] for r in records]
    assert set(adapters) == {None, "sql", "json", "pirate"}


def test_prompts_and_texts_are_transformers_own() -> None:
    with LLM("tiny", dtype="float32") as llm:
        chats = [r for r in RECORDS if "messages" in r]
        params = [SamplingParams(temperature=0, max_tokens=len(r["output_ids"])) for r in chats]
        outputs = llm.chat([r["messages"] for r in chats], params)
    assert [o.prompt_token_ids for o in outputs] == [r["prompt_ids"] for r in chats]
    assert [o.text for o in outputs] == [r["text"] for r in chats]
