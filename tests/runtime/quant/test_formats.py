"""Every stored format: what is read is what was written, whole and cut, and multiplies so."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrun import folder
from kvrun.errors import BadCheckpoint, KvrunError, Unsupported
from kvrun.runtime import quant
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.hf_config import HFConfig
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.quant import _coded, _cpu, hqq
from kvrun.runtime.source import Ranges
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.quant.formats import FORMATS
from tests.runtime.test_parallel import Threads

N, K = 96, 128
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2",
          "w3")  # fmt: skip


def write(path: Path, said: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    config = {"model_type": "llama", "num_hidden_layers": 1, "quantization_config": said}
    (path / "config.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    return path


def stored(path: Path, name: str, k: int = K) -> torch.Tensor:
    """One matrix "a" in the format `name`; what it stands for."""
    said, writer = FORMATS[name]
    tensors, ref = writer(torch.randn(N, k, generator=torch.Generator().manual_seed(7)))
    write(path, said, {f"a.{suffix}": t for suffix, t in tensors.items()})
    return ref


def decoded(w: Checkpoint, shard: Shard) -> torch.Tensor:
    """The matrix as its file of formats finds it."""
    method = w.config.quant_method.replace("-", "_")
    found = folder.load(quant.__name__, method).decode(w, shard)
    if isinstance(found, torch.Tensor):  # of values, where columns share no scales
        return found
    return w4a16.dequantise(found, torch.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_the_values_are_those_written(tmp_path: Path, name: str) -> None:
    ref = stored(tmp_path / "m", name)
    w = Checkpoint(tmp_path / "m")
    found = decoded(w, Shard("a", N, K))
    w.finish()  # every tensor of the file has its meaning
    w.close()
    exact = not name.startswith(("nf4-double", "bitsandbytes", "torchao-int4"))
    torch.testing.assert_close(found, ref, rtol=0 if exact else 1e-6, atol=0 if exact else 5e-7)


CUTS: list[tuple[Ranges | None, Ranges | None]] = [
    (((0, 48),), None),
    (((64, 80), (16, 24)), None),
    (None, ((64, 128),)),
    (None, ((16, 48), (96, 112))),
    (((5, 9), (40, 43)), ((0, 64),)),
]


@pytest.mark.parametrize(("rows", "cols"), CUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_is_that_part_of_the_whole(
    tmp_path: Path, name: str, rows: Ranges | None, cols: Ranges | None
) -> None:
    stored(tmp_path / "m", name)
    w = Checkpoint(tmp_path / "m")
    whole = decoded(w, Shard("a", N, K))
    part = decoded(w, Shard("a", N, K, rows, cols))
    w.close()
    if rows is not None:
        whole = torch.cat([whole[a:b] for a, b in rows])
    if cols is not None:
        whole = torch.cat([whole[:, a:b] for a, b in cols], 1)
    assert torch.equal(part, whole)


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_values(tmp_path: Path, name: str, rows: int) -> None:
    """With a bias, with a sum, two matrices joined; error of bf16 rows and scales at most."""
    ref = stored(tmp_path / "m", name)
    w = Checkpoint(tmp_path / "m")
    weight = quant.read(w, [Shard("a", N, K), Shard("a", N, K, rows=((32, 64),))], False)
    w.close()
    x, add = torch.randn(rows, K), torch.randn(rows, N + 32)
    wanted = x @ torch.cat([ref, ref[32:64]]).t()
    assert off(weight.matmul(x), wanted) < 1e-2
    assert off(weight.matmul(x, add.clone()), wanted + add) < 1e-2
    out = torch.empty(rows, N + 32)
    assert weight.matmul(x, out=out) is out
    assert off(out, wanted) < 1e-2


@pytest.mark.parametrize("rows", [1, 5, 200])
@pytest.mark.parametrize(
    "name", ["gptq-4bit", "packed-4bit-zero", "awq-gemm", "int-quantized", "gptq-8bit-channel"]
)
def test_products_without_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    monkeypatch.setattr(_cpu, "native", lambda name: None)
    test_products_are_those_of_the_values(tmp_path, name, rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_and_sums_of_other_types(tmp_path: Path, dtype: torch.dtype) -> None:
    """A sum may be wider than the rows, or lie between others; float16 has no kernel."""
    ref = stored(tmp_path / "m", "int-quantized")
    w = Checkpoint(tmp_path / "m")
    weight = quant.read(w, [Shard("a", N, K)], False)
    w.close()
    x, add, wide = torch.randn(3, K).to(dtype), torch.randn(3, N).to(dtype), torch.randn(3, 2 * N)
    wanted = x.float() @ ref.t()
    assert weight.matmul(x).dtype is dtype
    assert off(weight.matmul(x, add.clone()), wanted + add) < 1e-2
    assert off(weight.matmul(x, wide[:, :N]), wanted + wide[:, :N]) < 1e-2
    assert off(weight.matmul(x.float(), wide[:, N:]), wanted + wide[:, N:]) < 1e-2


def off(got: torch.Tensor, ref: torch.Tensor) -> float:
    return float((got.double() - ref.double()).norm() / ref.double().norm())


def quantized(
    path: Path, name: str, family: str = "llama", variant: str = "biases", **more: Any
) -> Path:
    """A model of a family, its matrices stored in the format `name` at `path`/quantized; the same
    values plainly at `path`/plain."""
    plain, coded = path / "plain", path / "quantized"
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "head_dim": 32,
        "num_key_value_heads": 2,
    }
    sizes |= more
    zoo.make(plain, family, variant, num_attention_heads=4, **sizes)
    zoo.make(coded, family, variant, num_attention_heads=4, **sizes)
    said, writer = FORMATS[name]
    values = load_file(plain / "model.safetensors")
    files: dict[str, torch.Tensor] = {}
    for full, tensor in values.items():
        module = full.removesuffix(".weight")
        if tensor.ndim == 2 and module.endswith(LINEAR):
            tensors, values[full] = writer(tensor)
            files |= {f"{module}.{suffix}": t for suffix, t in tensors.items()}
        else:
            files[full] = tensor
    save_file(values, plain / "model.safetensors")
    zoo.edit_tensors(coded, lambda _: files)
    zoo.edit_config(coded, quantization_config=said)
    return coded


WORK = [[(0, list(range(11))), (1, list(range(40, 45)))], [(0, [7]), (1, [9])]]


def logits(driver: Driver) -> list[torch.Tensor]:
    return [torch.cat(driver.step(step)) for step in WORK]


MODELS = ["gptq-order", "awq-gemm", "packed-4bit-zero", "int-quantized", "fp8-block", "nf4-double",
          "bitsandbytes-int8", "torchao-int4", "torchao-float8-channel", "hqq-4bit"]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_like_its_values(tmp_path: Path, name: str) -> None:
    coded = quantized(tmp_path, name)
    got, wanted = logits(Driver(coded)), logits(Driver(tmp_path / "plain"))
    assert off(torch.cat(got), torch.cat(wanted)) < 3e-2


@pytest.mark.parametrize(("family", "variant"), [("qwen3", "plain"), ("gemma2", "plain")])
def test_other_families_read_them_too(tmp_path: Path, family: str, variant: str) -> None:
    coded = quantized(tmp_path, "packed-4bit", family, variant)
    got, wanted = logits(Driver(coded)), logits(Driver(tmp_path / "plain"))
    assert off(torch.cat(got), torch.cat(wanted)) < 3e-2


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_answer_like_one(tmp_path: Path, name: str) -> None:
    coded = quantized(tmp_path, name)
    barrier, places = threading.Barrier(2), [torch.empty(0)] * 2
    with ThreadPoolExecutor(2) as pool:
        ranks = list(
            pool.map(lambda r: logits(Driver(coded, group=Threads(r, 2, barrier, places))), (0, 1))
        )
    assert torch.equal(torch.cat(ranks[0]), torch.cat(ranks[1]))
    assert off(torch.cat(ranks[0]), torch.cat(logits(Driver(tmp_path / "plain")))) < 3e-2


@pytest.mark.parametrize("name", MODELS)
def test_random_weights_of_every_format(tmp_path: Path, name: str) -> None:
    """`load_format="dummy"` needs config.json only."""
    coded = quantized(tmp_path, name)
    (coded / "model.safetensors").unlink()
    driver = Driver(coded, load_format="dummy")
    assert torch.cat(logits(driver)).isfinite().all()
    plain = Driver(tmp_path / "plain", load_format="dummy")
    values = name in ("fp8-block", "nf4-double", "torchao-float8-channel")  # on CPU
    less = plain.model.parameter_bytes > driver.model.parameter_bytes
    assert less is not values


@pytest.mark.parametrize("name", ["gptq-4bit", "packed-4bit", "awq-gemm"])
def test_codes_stay_codes_in_memory(tmp_path: Path, name: str) -> None:
    """A matrix of 4 bits takes a sixth of what it takes in fp32, scales included."""
    stored(tmp_path / "m", name, 2 * K)
    w = Checkpoint(tmp_path / "m")
    quant.read(w, [Shard("a", N, 2 * K)], False)
    w.close()
    assert w.parameter_bytes < N * 2 * K * 4 / 6


def refused(kind: type[KvrunError], action: Callable[[], object], *words: str) -> None:
    with pytest.raises(kind) as caught:
        action()
    for word in words:
        assert word in str(caught.value)
    assert caught.value.hint


def change(path: Path, **changes: torch.Tensor | None) -> None:
    values = load_file(path / "model.safetensors")
    for suffix, tensor in changes.items():
        values.pop(f"a.{suffix}", None)
        if tensor is not None:
            values[f"a.{suffix}"] = tensor
    save_file(values, path / "model.safetensors")


def read_one(path: Path) -> None:
    w = Checkpoint(path)
    try:
        quant.read(w, [Shard("a", N, K)], False)
        w.finish()
    finally:
        w.close()


@pytest.mark.parametrize(
    ("name", "gone"),
    [("gptq-4bit", "scales"), ("gptq-4bit", "qzeros"), ("awq-gemm", "scales"),
     ("packed-4bit", "weight_scale"), ("fp8-block", "weight"), ("nf4", "weight"),
     ("nf4-double", "weight.nested_absmax"), ("bitsandbytes-int8", "weight"),
     ("torchao-int8", "_weight_scale"), ("torchao-int4", "_weight_zero_point"),
     ("torchao-float8-block", "_weight_scale"), ("hqq-4bit", "scale"), ("hqq-4bit", "zero")],
)  # fmt: skip
def test_a_tensor_that_is_missing_is_named(tmp_path: Path, name: str, gone: str) -> None:
    stored(tmp_path / "m", name)
    change(tmp_path / "m", **{gone: None})
    refused(BadCheckpoint, lambda: read_one(tmp_path / "m"), f"a.{gone}")


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("gptq-4bit", {"qweight": torch.zeros(5, N, dtype=torch.int32)}, "5 words"),
        ("gptq-4bit", {"qweight": torch.zeros(5, dtype=torch.int32)}, "a.qweight is [5]"),
        ("gptq-4bit", {"qweight": torch.zeros(16, N)}, "stored as F32"),
        ("gptq-4bit", {"g_idx": torch.full((K,), 4, dtype=torch.int32)}, "group 4"),
        ("packed-4bit", {"weight_packed": torch.zeros(N, 7, dtype=torch.int32)}, "7 words"),
        ("packed-4bit", {"weight_scale": torch.zeros(3, 4)}, "a.weight_scale is [3, 4]"),
        ("fp8-block", {"weight_scale_inv": torch.zeros(2, 2)}, "a.weight_scale_inv is [2, 2]"),
        ("fp8-block", {"weight": torch.zeros(N, K, dtype=torch.int8)}, "float8_e4m3fn"),
        ("nf4", {"weight": torch.zeros(9, 1, dtype=torch.uint8)}, "a.weight does not hold"),
        ("int-quantized", {"weight": torch.zeros(N, 3, dtype=torch.int8)}, "a.weight is [96, 3]"),
        ("torchao-intx4", {"_weight_scale": torch.ones(N, 5)}, "_weight_scale is [96, 5]"),
        ("torchao-int8", {"_weight_zero_point": torch.ones(3, 1)}, "_weight_zero_point is [3, 1]"),
        ("torchao-int4", {"_weight_scale": torch.ones(5, N)}, "5 groups"),
        ("torchao-float8-block", {"_weight_scale": torch.ones(7, 4)}, "_weight_scale is [7, 4]"),
        ("hqq-4bit", {"scale": torch.ones(5, 1), "zero": torch.ones(5, 1)}, "[5, 1]"),
        ("hqq-4bit", {"scale": torch.ones(16, 24)}, "[16, 24]"),
        ("hqq-4bit", {"W_q": torch.zeros(100, 32, dtype=torch.uint8)}, "a.W_q is [100, 32]"),
        ("hqq-3bit", {"W_q": torch.zeros(9, 32, dtype=torch.int32)}, "a.W_q is [9, 32]"),
    ],
)  # fmt: skip
def test_a_wrong_tensor_is_named(
    tmp_path: Path, name: str, changes: dict[str, torch.Tensor], words: str
) -> None:
    stored(tmp_path / "m", name)
    change(tmp_path / "m", **changes)
    refused(BadCheckpoint, lambda: read_one(tmp_path / "m"), words)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"quant_method": "gguf"}, "safetensors"),
        ({"quant_method": "quip"}, "'quip'"),
        ({"quant_method": "awq", "bits": 3}, "3 bits"),
        ({"quant_method": "awq", "version": "gemv_fast"}, "gemv_fast"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "marlin-24"),
    ],
)
def test_a_format_that_is_not_read_is_refused(
    tmp_path: Path, said: dict[str, Any], words: str
) -> None:
    write(tmp_path / "m", said, {"a.qweight": torch.zeros(K, N // 8, dtype=torch.int32)})
    refused(Unsupported, lambda: read_one(tmp_path / "m"), words)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("torchao-int4", {"_weight_qdata": torch.zeros(12, 1, 32, 4, dtype=torch.int32)}, "packed"),
        ("torchao-int8", {"_weight_act_pre_scale": torch.ones(K)}, "factors for its inputs"),
        ("hqq-4bit", {"zero": None, "zero_q": torch.zeros(4, 1)}, "quantized themselves"),
    ],
)
def test_a_form_of_a_format_that_is_not_read_is_refused(
    tmp_path: Path, name: str, changes: dict[str, torch.Tensor | None], words: str
) -> None:
    stored(tmp_path / "m", name)
    change(tmp_path / "m", **changes)
    refused(Unsupported, lambda: read_one(tmp_path / "m"), words)


def test_float_zeros_stay_what_they_are_when_matrices_are_joined(tmp_path: Path) -> None:
    ref = stored(tmp_path / "m", "hqq-4bit")
    w = Checkpoint(tmp_path / "m")
    parts = [hqq.decode(w, Shard("a", N, K, rows)) for rows in (((0, 32),), ((32, N),))]
    w.close()
    both = _coded.join([part for part in parts if isinstance(part, w4a16.Coded)])
    assert torch.equal(w4a16.dequantise(both, torch.float32), ref)


@pytest.mark.parametrize(
    ("name", "said", "words"),
    [
        ("fp8-block", {"weight_block_size": ["a", 0]}, "weight_block_size"),
        ("gptq-4bit", {"group_size": "many"}, "group_size"),
        ("gptq-4bit", {"bits": 0}, "bits"),
        ("gptq-4bit", {"dynamic": {"+:(": {"bits": 4}}}, "no pattern"),
        ("awq-gemm", {"group_size": 0}, "group_size"),
    ],
)
def test_a_wrong_configuration_is_named(
    tmp_path: Path, name: str, said: dict[str, Any], words: str
) -> None:
    stored(tmp_path / "m", name)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    config["quantization_config"] |= said
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=words):
        read_one(tmp_path / "m")


def test_modules_that_are_not_converted_are_read_plainly(tmp_path: Path) -> None:
    weight = torch.randn(N, K)
    said = {"quant_method": "awq", "modules_to_not_convert": ["a"]}
    write(tmp_path / "m", said, {"a.weight": weight})
    w = Checkpoint(tmp_path / "m")
    x = torch.randn(3, K)
    got = quant.read(w, [Shard("a", N, K)], False).matmul(x)
    w.close()
    assert off(got, x @ weight.t()) < 1e-6


@pytest.mark.parametrize(
    ("file", "values", "method", "bits"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "sym": False}, "gptq", "bits"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "version": "GEMM"}, "awq", "w_bit"),
    ],
)
def test_old_files_say_it_beside_the_config(
    tmp_path: Path, file: str, values: dict[str, Any], method: str, bits: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / file).write_text(json.dumps(values))
    config = HFConfig.read(tmp_path)
    assert config.quant_method == method
    assert config.quantization().integer(bits) == 4
