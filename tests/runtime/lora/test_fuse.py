"""fuse: a model whose weights hold an adapter says what the adapter beside the model says."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrun.errors import InvalidRequest, KvrunError, Unsupported
from kvrun.runtime.lora import fuse as module
from kvrun.runtime.lora.fuse import fuse
from tests.runtime.driver import Driver
from tests.runtime.lora.adapters import ALL, edit, peft_model, write
from tests.runtime.models import zoo

IDS = list(range(3, 20))


@pytest.mark.parametrize("variant", ["v3", "v3.1"])
def test_fused_weights_say_what_peft_says(tmp_path: Path, variant: str) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    patterns = {"k_proj": 2}
    peft = peft_model(
        zoo.make(base, "llama", variant), 1, r=8, use_rslora=True, rank_pattern=patterns
    )
    peft.save_pretrained(adapter, save_embedding_layers=False)
    with torch.no_grad():
        expected = peft(torch.tensor([IDS])).logits[0]
    seen: list[int] = []
    assert fuse(base, adapter, tmp_path / "out", lambda done, all: seen.append(done)) == 14
    assert seen == list(range(1, len(seen) + 1))
    (found,) = Driver(tmp_path / "out").step([(0, IDS)])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in changed} == set(ALL)
    assert all(before[name].dtype is after[name].dtype for name in before)


def test_transposed_weights(tmp_path: Path) -> None:
    """GPT-2 keeps its matrices as [in, out]; A and B know nothing of it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "gpt2"}')
    save_file({"h.0.attn.c_attn.weight": torch.zeros(8, 24)}, base / "model.safetensors")
    deltas = write(adapter, {"transformer.h.0.attn.c_attn": (24, 8)}, fan_in_fan_out=True)
    fuse(base, adapter, tmp_path / "out")
    (found,) = load_file(tmp_path / "out" / "model.safetensors").values()
    torch.testing.assert_close(found, deltas["transformer.h.0.attn.c_attn"].t())


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    zoo.make(base, "llama", "v3")
    write(adapter, {"model.layers.0.self_attn.q_proj": (64, 64)})
    with pytest.raises(InvalidRequest, match="exists"):
        fuse(base, adapter, base)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", full)
        with pytest.raises(KvrunError, match="cannot be written"):
            fuse(base, adapter, out)
    edit(adapter, use_dora=True)
    with pytest.raises(Unsupported) as caught:
        fuse(base, adapter, out)
    assert "use_dora" in str(caught.value)
    edit(adapter, use_dora=False)
    zoo.edit_config(base, quantization_config={"quant_method": "gptq"})
    with pytest.raises(Unsupported, match="quantized"):
        fuse(base, adapter, out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "base"]
