"""Families of every kind of layer through the whole engine: chunks, shared prefixes, preemption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun import LLM, SamplingParams
from kvrun.runtime.cache.states import bytes_per_sequence
from kvrun.runtime.cache.tensors import bytes_per_block
from tests.runtime.driver import Driver
from tests.runtime.models.compare import prompt

KINDS = [
    ("gpt2", "plain"),  # learned positions, transposed matrices
    ("bloom", "6 heads"),  # distances
    ("opt", "350m"),  # norms behind, projected embedding
    ("cohere", "plus"),  # side by side
    ("gemma3_text", "plain"),  # windows
    ("llama4_text", "scout"),  # chunks
    ("mixtral", "plain"),  # experts
    ("deepseek_v3", "plain"),  # latent attention
    ("mamba", "plain"),  # states
    ("mamba2", "plain"),
    ("granitemoehybrid", "experts"),  # states and attention
]


@pytest.mark.parametrize(("family", "variant"), KINDS, ids=[f"{f}-{v}" for f, v in KINDS])
def test_greedy_answers_are_those_of_transformers(
    models: Callable[[str, str], tuple[Path, Any]], family: str, variant: str
) -> None:
    folder, oracle = models(family, variant)
    first = prompt(1, 12)
    prompts = [first, first[:8] + prompt(2, 9), prompt(3, 5), prompt(4, 20)]
    params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
    # Nineteen blocks of four tokens beside the padding: the four do not fit at once.
    model = Driver(folder).model
    # With as many states as four sequences have in all, and the padding's.
    memory = 20 * bytes_per_block(model.specs, 4, torch.float32)
    memory += 5 * bytes_per_sequence(model.states, torch.float32)
    sizes: Any = {"block_size": 4, "max_num_batched_tokens": 8, "max_model_len": 48}
    with LLM(str(folder), kv_memory=memory, max_num_seqs=4, **sizes) as llm:
        found = [list(out.token_ids) for out in llm.generate(prompts, params)]
    for ids, answer in zip(prompts, found, strict=True):
        with torch.inference_mode():
            wanted = oracle.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=16,
                do_sample=False,
            )[0, len(ids) :].tolist()
        assert answer == wanted
