"""kvrun quantize: what is written is read back, by transformers too; text helps; faults."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from kvrun.errors import InvalidRequest, KvrunError, NotFound, Unsupported
from kvrun.hub.local import resolve
from kvrun.runtime.calibrate import job, samples, solve
from kvrun.runtime.calibrate.check import compare
from kvrun.runtime.calibrate.job import Recipe, quantize
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.config import METHODS
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.quant import compressed_tensors
from kvrun.runtime.quant._round import whole
from tests.runtime.driver import Driver
from tests.runtime.models import zoo

SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 2}
PROMPTS = [[(7 * i + j * j) % 128 for j in range(40)] for i in range(6)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    zoo.make(folder, "llama", "v3", **SIZES, dtype="bfloat16")
    return folder


SHAPES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}  # fmt: skip
# It warns of what it was asked for.
asked = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


def transformers_model(folder: Path, dtype: torch.dtype) -> Any:
    config = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)


def logits(folder: Path) -> torch.Tensor:
    return torch.cat(Driver(folder).step([(0, list(range(30)))]))


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got - ref).norm() / ref.norm())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_model(tmp_path: Path, plain: Path, method: str) -> None:
    out = tmp_path / "new"
    quantize(plain, out, Recipe("m", method), PROMPTS)
    # Random weights make much of small errors.
    limit = 0.06 if method == "int8" else 0.2 if method == "fp8" else 0.7
    assert off(logits(out), logits(plain)) < limit
    assert json.loads((out / job.RECIPE).read_text())["method"] == method
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert all(path.suffix in (".json", ".safetensors") for path in out.iterdir())


@asked
@pytest.mark.parametrize("method", ["int8", "int4", "gptq", "awq", "fp8"])
def test_transformers_reads_the_same_values(tmp_path: Path, plain: Path, method: str) -> None:
    out = tmp_path / "new"
    quantize(plain, out, Recipe("m", method, 32 if method == "int4" else None), PROMPTS)
    theirs = dict(transformers_model(out, torch.bfloat16).named_parameters())
    w = Checkpoint(out, dtype=torch.bfloat16)
    for n in range(2):
        for name, shape in SHAPES.items():
            full = f"model.layers.{n}.{name}"
            found = compressed_tensors.decode(w, Shard(full, *shape))
            ours = w4a16.dequantise(found, torch.bfloat16)
            assert torch.equal(ours, theirs[f"{full}.weight"])
        for name in ("input_layernorm", "post_attention_layernorm"):
            full = f"model.layers.{n}.{name}.weight"
            assert torch.equal(w.read(full, (128,)), theirs[full])
    w.close()


@asked
def test_transformers_answers_like_kvrun(tmp_path: Path, plain: Path) -> None:
    out = tmp_path / "new"
    quantize(plain, out, Recipe("m", "awq"), PROMPTS)
    with torch.inference_mode():
        theirs = transformers_model(out, torch.float32)(torch.arange(30).view(1, -1)).logits[0]
    assert off(logits(out), theirs) < 0.04


def test_text_makes_rounding_better() -> None:
    """Columns that belong together, a few of them large: what GPTQ and AWQ are made for."""
    torch.manual_seed(0)
    x = torch.randn(2000, 64) @ torch.randn(64, 128) / 8 + 0.5 * torch.randn(2000, 128)
    x[:, ::32] *= 20
    weight = torch.randn(64, 128)
    hessian = solve.damped(x.t() @ x, len(x))

    def lost(values: torch.Tensor) -> float:
        return float((x @ (values - weight).t()).norm() / (x @ weight.t()).norm())

    rounded = lost(whole(weight, 4, 128, symmetric=True).values())
    solved = lost(solve.gptq(weight, hessian, 4, 128, torch.float32).values())
    factor = solve.scales([weight], hessian, 4, 128)
    weigh = hessian.diagonal() / factor.square()
    shifted = lost(
        whole(weight * factor, 4, 128, symmetric=True, importance=weigh).values() / factor
    )
    assert solved < 0.6 * rounded
    assert shifted < 0.8 * rounded


def test_tiny_loses_little_and_less_with_text(tmp_path: Path) -> None:
    folder = resolve("tiny")
    seen, kept = samples.prompts(folder, "builtin", 6, 256)
    found = {}
    for method in ("int8", "int4", "gptq", "awq"):
        quantize(folder, tmp_path / method, Recipe("tiny", method, samples=6), seen)
        found[method] = compare(folder, tmp_path / method, kept[:2])
    assert found["int8"].kl_mean < 0.01
    assert found["int8"].top1_agreement > 0.95
    assert found["gptq"].kl_mean < 0.6 * found["int4"].kl_mean
    assert found["awq"].kl_mean < found["int4"].kl_mean
    assert found["int4"].bytes < 0.4 * found["int4"].bytes_before
    same = compare(folder, folder, kept[:1])
    assert (same.kl_mean, same.top1_agreement) == (0.0, 1.0)
    assert same.perplexity == same.perplexity_before


@pytest.mark.parametrize("method", ["int4", "awq", "gptq"])
def test_an_interrupted_job_goes_on(tmp_path: Path, plain: Path, method: str) -> None:
    recipe, said = Recipe("m", method), []

    def interrupt(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(plain, tmp_path / "a", recipe, PROMPTS, progress=interrupt)
    partial = tmp_path / f"a{job.PARTIAL}"
    first = next(partial.glob("layer-00000*"))
    written = first.stat().st_mtime_ns
    assert not (tmp_path / "a").exists()

    def see(done: int, total: int, what: str) -> None:
        said.append((done, first.stat().st_mtime_ns))

    quantize(plain, tmp_path / "a", recipe, PROMPTS, progress=see)
    quantize(plain, tmp_path / "b", recipe, PROMPTS)
    assert {at for _, at in said} == {written}  # the first layer was not made again
    assert not partial.exists()
    for path in sorted((tmp_path / "b").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_another_job_does_not_go_on_with_it(tmp_path: Path, plain: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(plain, tmp_path / "a", Recipe("m", "int4"), [], progress=interrupt)
    quantize(plain, tmp_path / "a", Recipe("m", "int8"), [])
    quantize(plain, tmp_path / "b", Recipe("m", "int8"), [])
    assert torch.equal(logits(tmp_path / "a"), logits(tmp_path / "b"))


def refused(kind: type[KvrunError], words: str, out: Path, *args: Any) -> None:
    """It says so, and leaves nothing behind."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(kind, match=words) as caught:
        quantize(*args)
    assert caught.value.hint
    assert sorted(out.parent.rglob("*")) == before


def test_faults(tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with pytest.raises(InvalidRequest, match="int3"):
        Recipe("m", "int3")
    with pytest.raises(InvalidRequest, match="--group-size is 20"):
        Recipe("m", "int4", 20)
    with pytest.raises(InvalidRequest, match="--group-size is 64"):
        Recipe("m", "fp8", 64)
    refused(InvalidRequest, "do not divide", out, plain, out, Recipe("m", "int4", 96), [])
    quantize(plain, tmp_path / "there", Recipe("m", "int8"), [])
    there = tmp_path / "there"
    refused(InvalidRequest, "is there already", out, plain, there, Recipe("m", "int8"), [])
    refused(Unsupported, "quantized already", out, there, out, Recipe("m", "int8"), [])
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        refused(KvrunError, "1.0 kB are free", out, plain, out, Recipe("m", "int8"), [])

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(job, "save_file", full)
        refused(KvrunError, "cannot be written", out, plain, out, Recipe("m", "int8"), [])


def test_text_that_is_not_there_or_too_short(tmp_path: Path) -> None:
    folder = resolve("tiny")
    with pytest.raises(NotFound, match="nothing.txt"):
        samples.prompts(folder, str(tmp_path / "nothing.txt"), 8, 64)
    (tmp_path / "short.txt").write_text("Hello there.")
    with pytest.raises(InvalidRequest, match="tokens; at least"):
        samples.prompts(folder, str(tmp_path / "short.txt"), 8, 64)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequest, match="not a text file"):
        samples.prompts(folder, str(tmp_path / "bytes.txt"), 8, 64)


def test_what_is_checked_has_not_been_seen() -> None:
    seen, kept = samples.prompts(resolve("tiny"), "builtin", 100, 128)
    assert len(seen) > 3 * len(kept) > 0
    assert not {tuple(part) for part in seen} & {tuple(part) for part in kept}
    assert all(len(part) == 128 for part in seen + kept)
