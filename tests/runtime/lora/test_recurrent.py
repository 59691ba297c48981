"""Adapters of Mamba's projections, beside the base in one batch, say what PEFT says."""

from pathlib import Path

import pytest
import torch

from kvrun import LLM, SamplingParams
from tests.runtime.lora.adapters import peft_model
from tests.runtime.models import zoo
from tests.runtime.models.compare import prompt

TARGETS = {
    "mamba": ("plain", ["in_proj", "x_proj"]),
    "mamba2": ("plain", ["in_proj"]),
    "granitemoehybrid": ("dense", ["in_proj", "q_proj", "v_proj", "output_linear"]),
}


@pytest.mark.parametrize("family", TARGETS)
def test_adapted_and_not(tmp_path: Path, family: str) -> None:
    variant, targets = TARGETS[family]
    base, adapter, ids = tmp_path / "base", tmp_path / "adapter", prompt(1, 11)
    model = zoo.make(base, family, variant)

    def say(model: torch.nn.Module) -> list[int]:
        with torch.inference_mode():
            found = model.generate(  # type: ignore[operator]
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=12,
                do_sample=False,
            )
        said: list[int] = found[0, len(ids) :].tolist()
        return said

    plain = say(model)
    adapted = peft_model(model, 1, target_modules=targets)
    adapted.save_pretrained(adapter)
    changed = say(adapted)
    assert changed != plain
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    with LLM(str(base), adapters={"it": str(adapter)}, max_model_len=64) as llm:
        outs = llm.generate([ids, ids], params, adapter=["it", None])
    assert [list(out.token_ids) for out in outs] == [changed, plain]
