"""Files as AutoGPTQ, AutoAWQ and bitsandbytes write them: read plainly here, and by kvrun."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kvrun import folder
from kvrun.errors import InvalidRequest, Unsupported
from kvrun.runtime import quant
from kvrun.runtime.calibrate import job, store
from kvrun.runtime.calibrate.job import Recipe, quantize
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.kernels import w4a16
from tests.runtime.calibrate.test_job import PROMPTS, SHAPES, SIZES, logits, off
from tests.runtime.models import zoo
from tests.runtime.quant.formats import NF4

WRITTEN = [
    (form, method)
    for form, methods in store.FORMATS.items()
    for method in methods
    if form != "compressed-tensors"
]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    zoo.make(path, "llama", "v3", **SIZES, dtype="bfloat16")
    return path


def spread(words: torch.Tensor, bits: int, places: list[int] | None = None) -> torch.Tensor:
    """[a, b] words of 32 bits -> [a, b · 32 / bits]; the i-th field of a word goes to places[i]."""
    count = 32 // bits
    out = torch.zeros(len(words), words.shape[1] * count)
    for i in range(count):
        field = (words.long() & 0xFFFFFFFF) // 2 ** (bits * i) % 2**bits
        out[:, (places[i] if places else i) :: count] = field.float()
    return out


def values(tensors: dict[str, torch.Tensor], said: dict[str, Any]) -> torch.Tensor:
    """A matrix [out, in] by the definition of its format."""
    if "SCB" in tensors:
        assert tensors["weight_format"].item() == 0
        return tensors["weight"].float() * (tensors["SCB"] / 127)[:, None]
    if "weight.absmax" in tensors:
        state = json.loads(bytes(tensors["weight.quant_state.bitsandbytes__nf4"].tolist()))
        packed = tensors["weight"].flatten()
        codes = torch.stack([packed // 16, packed % 16], 1).flatten().long()
        blocks = torch.tensor(NF4)[codes].view(-1, state["blocksize"])
        return (blocks * tensors["weight.absmax"][:, None]).view(state["shape"])
    bits, size = said["bits"], said["group_size"]
    assert tensors["scales"].dtype is torch.float16
    scale = tensors["scales"].float()
    if said["quant_method"] == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        codes, zero = (spread(tensors[n], 4, order) for n in ("qweight", "qzeros"))
        groups = torch.arange(len(codes)) // size
    else:
        codes = spread(tensors["qweight"].t(), bits).t()
        zero = spread(tensors["qzeros"], bits) + 1
        groups = tensors["g_idx"].long()
        per = len(codes) if size == -1 else size
        assert torch.equal(groups, torch.arange(len(codes)) // per)
        assert bool((zero == 2 ** (bits - 1)).all())  # as `sym` promises
    return ((codes - zero[groups]) * scale[groups]).t()


@pytest.mark.parametrize(("form", "method"), WRITTEN)
def test_files_hold_what_kvrun_reads(tmp_path: Path, plain: Path, form: str, method: str) -> None:
    out = tmp_path / "new"
    group = 32 if method == "int4" else None
    quantize(plain, out, Recipe("m", method, group, format=form), PROMPTS)
    config = json.loads((out / "config.json").read_text())
    said = config["quantization_config"]
    assert said["quant_method"] == form
    files: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        files |= load_file(path)
    w = Checkpoint(out)
    decode = folder.load(quant.__name__, form).decode
    for n in range(2):
        for name, shape in SHAPES.items():
            full = f"model.layers.{n}.{name}"
            own = {f[len(full) + 1 :]: t for f, t in files.items() if f.startswith(f"{full}.")}
            ours = w4a16.dequantise(decode(w, Shard(full, *shape)), torch.float32)
            torch.testing.assert_close(ours, values(own, said), rtol=3e-7, atol=1e-8)
    w.close()
    assert files["model.norm.weight"].dtype is torch.bfloat16
    assert files["model.layers.0.input_layernorm.weight"].dtype is torch.bfloat16
    assert off(logits(out), logits(plain)) < (0.06 if method == "int8" else 0.7)


def test_configurations_are_those_of_the_other_tools(tmp_path: Path, plain: Path) -> None:
    said = {}
    for form, method in (("gptq", "int4"), ("awq", "int4"), ("bitsandbytes", "int8")):
        quantize(plain, tmp_path / form, Recipe("m", method, format=form), PROMPTS)
        config = json.loads((tmp_path / form / "config.json").read_text())
        said[form] = config["quantization_config"]
    wanted = {
        "gptq": {"bits": 4, "group_size": 128, "sym": True, "desc_act": False,
                 "checkpoint_format": "gptq"},
        "awq": {"bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
        "bitsandbytes": {"load_in_8bit": True, "load_in_4bit": False, "llm_int8_threshold": 6.0},
    }  # fmt: skip
    for form, values in wanted.items():
        assert said[form].items() >= values.items()
    assert json.loads((tmp_path / "gptq" / "quantize_config.json").read_text()) == said["gptq"]
    assert "dynamic" not in said["gptq"]  # every matrix of a layer is quantized
    assert "lm_head" in said["awq"]["modules_to_not_convert"]


def test_zeros_of_awq_files_make_them_better(tmp_path: Path, plain: Path) -> None:
    """Ranges that are not even around 0."""
    shutil.copytree(plain, tmp_path / "m")
    zoo.edit_tensors(
        tmp_path / "m",
        lambda t: {n: v + 0.3 if n.endswith("up_proj.weight") else v for n, v in t.items()},
    )
    lost = {}
    ref = load_file(tmp_path / "m" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    for form in ("awq", "gptq"):
        quantize(tmp_path / "m", tmp_path / form, Recipe("m", "int4", format=form), [])
        w = Checkpoint(tmp_path / form)
        shard = Shard("model.layers.0.mlp.up_proj", 256, 128)
        found = folder.load(quant.__name__, form).decode(w, shard)
        w.close()
        lost[form] = off(w4a16.dequantise(found, torch.float32), ref.float())
    assert lost["awq"] < 0.9 * lost["gptq"]


@pytest.mark.parametrize(("form", "method"), [("gptq", "gptq"), ("awq", "awq")])
def test_an_interrupted_job_goes_on(tmp_path: Path, plain: Path, form: str, method: str) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    recipe = Recipe("m", method, format=form)
    with pytest.raises(KeyboardInterrupt):
        quantize(plain, tmp_path / "a", recipe, PROMPTS, progress=interrupt)
    assert (tmp_path / f"a{job.PARTIAL}").is_dir()
    quantize(plain, tmp_path / "a", recipe, PROMPTS)
    quantize(plain, tmp_path / "b", recipe, PROMPTS)
    for path in sorted((tmp_path / "b").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("form", "method", "words"),
    [("awq", "int8", "--method int8"), ("gptq", "fp8", "--method fp8"), ("gguf", "int4", "gguf"),
     ("bitsandbytes", "gptq", "--method gptq")],
)  # fmt: skip
def test_what_a_format_has_no_room_for(form: str, method: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        Recipe("m", method, format=form)
    assert caught.value.hint


def test_words_that_do_not_divide(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_key_value_heads": 1, "head_dim": 4, "num_attention_heads": 32}
    zoo.make(tmp_path / "m", "llama", "v3", **sizes)
    with pytest.raises(InvalidRequest, match="do not divide"):
        quantize(tmp_path / "m", tmp_path / "out", Recipe("m", "int4", format="awq"), [])
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_experts_of_their_own_are_quantized(tmp_path: Path) -> None:
    """Each by what it has seen; routers stay plain, and the files say so."""
    sizes = {"moe_intermediate_size": 64, "dtype": "float32"}
    zoo.make(tmp_path / "m", "qwen3_moe", "dense first", **sizes)
    out = tmp_path / "out"
    quantize(tmp_path / "m", out, Recipe("m", "gptq", 32, format="gptq"), PROMPTS)
    files: dict[str, torch.Tensor] = {}
    for path in out.glob("*.safetensors"):
        files |= load_file(path)
    for n in range(4):
        assert f"model.layers.1.mlp.experts.{n}.down_proj.qweight" in files
    assert "model.layers.1.mlp.gate.weight" in files
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["dynamic"] == {r"-:model\.layers\.1\.mlp\.gate$": {}}
    assert off(logits(out), logits(tmp_path / "m")) < 0.5


def test_experts_in_one_tensor_are_refused(tmp_path: Path) -> None:
    zoo.make(tmp_path / "m", "granitemoe", "plain")
    with pytest.raises(Unsupported, match="lie in one tensor") as caught:
        quantize(tmp_path / "m", tmp_path / "out", Recipe("m", "int4", 32), [])
    assert "--quantize" in str(caught.value.hint)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
