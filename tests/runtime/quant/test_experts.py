"""Quantized experts: stored by themselves or stacked, rounded as they are read, whole and cut."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from kvrun.errors import BadCheckpoint, Unsupported
from kvrun.runtime import quant
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.kernels import w4a16
from kvrun.runtime.kernels.moe import one
from kvrun.runtime.models import build
from kvrun.runtime.quant import _coded, _stack, mxfp4
from tests.runtime.driver import Driver
from tests.runtime.lora import adapters
from tests.runtime.models import zoo
from tests.runtime.quant.test_formats import logits, off, quantized, write
from tests.runtime.test_parallel import Threads

SIZES = {"moe_intermediate_size": 64, "num_local_experts": 4}
# Formats whose codes stay codes on CPU, and formats that become values.
LISTED = [
    ("packed-4bit-zero", "mixtral", "plain"),
    ("gptq-order", "qwen3_moe", "plain"),
    ("awq-gemm", "qwen3_moe", "dense first"),
    ("fp8-block", "deepseek_v3", "halves"),
    ("nf4-double", "mixtral", "plain"),
    ("bitsandbytes-int8", "qwen2_moe", "plain"),
]


@pytest.mark.parametrize(("name", "family", "variant"), LISTED)
def test_experts_of_their_own_in_every_format(
    tmp_path: Path, name: str, family: str, variant: str
) -> None:
    sizes: dict[str, Any] = dict(SIZES)
    if family == "deepseek_v3":
        sizes |= {"num_key_value_heads": 4}
        del sizes["num_local_experts"]
    coded = quantized(tmp_path, name, family, variant, **sizes)
    wanted = torch.cat(logits(Driver(tmp_path / "plain")))
    assert off(torch.cat(logits(Driver(coded))), wanted) < 5e-2
    barrier, places = threading.Barrier(2), [torch.empty(0)] * 2
    with ThreadPoolExecutor(2) as pool:
        ranks = list(
            pool.map(lambda r: logits(Driver(coded, group=Threads(r, 2, barrier, places))), (0, 1))
        )
    assert torch.equal(torch.cat(ranks[0]), torch.cat(ranks[1]))
    assert off(torch.cat(ranks[0]), wanted) < 5e-2


def gpt_oss(path: Path, **changes: Any) -> Path:
    """A model with experts in mxfp4 at `path`/coded; their values, which transformers makes, plain
    at `path`/plain."""
    sizes = {"intermediate_size": 64, "dtype": "float32", **changes}
    for folder in ("plain", "coded"):
        zoo.make(path / folder, "gpt_oss", "plain", **sizes)
    files = load_file(path / "plain" / "model.safetensors")
    coded = dict(files)
    for name in [name for name in files if name.endswith("_proj") and ".experts." in name]:
        count, k, n = files[name].shape
        blocks = torch.randint(0, 256, (count, n, k // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 126, (count, n, k // 32), dtype=torch.uint8)
        coded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        del coded[name]
        files[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    save_file({n: t.contiguous() for n, t in files.items()}, path / "plain" / "model.safetensors")
    save_file(coded, path / "coded" / "model.safetensors")
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    zoo.edit_config(path / "coded", quantization_config=said)
    return path / "coded"


def test_mxfp4_answers_like_the_values_of_transformers(tmp_path: Path) -> None:
    coded = gpt_oss(tmp_path)
    wanted = torch.cat(logits(Driver(tmp_path / "plain")))
    assert torch.equal(torch.cat(logits(Driver(coded))), wanted)
    barrier, places = threading.Barrier(4), [torch.empty(0)] * 4
    with ThreadPoolExecutor(4) as pool:  # cuts of 16 columns: blocks are halved
        ranks = list(
            pool.map(
                lambda r: logits(Driver(coded, group=Threads(r, 4, barrier, places))), range(4)
            )
        )
    assert off(torch.cat(ranks[3]), wanted) < 1e-4


def test_mxfp4_needs_no_files_for_a_dummy(tmp_path: Path) -> None:
    coded = gpt_oss(tmp_path)
    (coded / "model.safetensors").unlink()
    assert torch.cat(logits(Driver(coded, load_format="dummy"))).isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.down_proj_scales"), "down_proj_scales"),
        (lambda t: t.pop("model.layers.0.mlp.experts.gate_up_proj_blocks"), "gate_up_proj_blocks"),
        (
            lambda t: t.update(
                {
                    "model.layers.0.mlp.experts.down_proj_scales": torch.zeros(
                        5, 64, 3, dtype=torch.uint8
                    )
                }
            ),
            r"\[5, 64, 3\]",
        ),
        (
            lambda t: t.update(
                {"model.layers.0.mlp.experts.down_proj_blocks": torch.zeros(5, 64, 2, 16)}
            ),
            "stored as F32",
        ),
    ],
)
def test_wrong_experts_are_named(tmp_path: Path, change: Any, words: str) -> None:
    coded = gpt_oss(tmp_path)
    tensors = load_file(coded / "model.safetensors")
    change(tensors)
    save_file(tensors, coded / "model.safetensors")
    with pytest.raises(BadCheckpoint, match=words):
        Driver(coded)


def test_columns_that_blocks_do_not_divide(tmp_path: Path) -> None:
    coded = gpt_oss(tmp_path)
    zoo.edit_config(coded, intermediate_size=72)
    with pytest.raises(BadCheckpoint):
        Driver(coded)


def test_stacks_in_other_formats_are_refused(tmp_path: Path) -> None:
    coded = gpt_oss(tmp_path)
    zoo.edit_config(coded, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(Unsupported, match="experts") as caught:
        Driver(coded)
    assert caught.value.hint


FAMILIES = [
    ("mixtral", "plain"),
    ("granitemoe", "plain"),
    ("gpt_oss", "plain"),
    ("llama4_text", "scout"),
    ("dbrx", "plain"),
]


@pytest.mark.parametrize("method", ["int8", "nf4"])
@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_experts_are_rounded_as_they_are_read(
    tmp_path: Path, family: str, variant: str, method: str
) -> None:
    """Their values change by what their codes lose, and no others do."""
    zoo.make(tmp_path / "m", family, variant)
    found = []
    for how in (None, method):
        model = build(Checkpoint(tmp_path / "m", quantize=how))
        experts = next(layer for block in model.blocks for layer in _moe(block))._experts
        found.append(_values(experts.gate_up, experts.hidden).t())
    worst = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    limit = {"int8": 1e-2, "nf4": 0.16}[method]
    assert 1e-4 < worst < limit


def _moe(block: Any) -> list[Any]:
    """The layers of experts in a block, in others or by themselves."""
    found = [block] if hasattr(block, "_experts") else []
    inside = [part for part in vars(block).values() if not isinstance(part, ModuleType)]
    parts = [part for part in inside if hasattr(part, "__dict__")]
    return found or [layer for part in parts for layer in _moe(part)]


def _values(stack: Any, columns: int) -> torch.Tensor:
    """Of the first expert, turned."""
    eye = torch.eye(columns)
    return eye @ stack[0].t() if isinstance(stack, torch.Tensor) else stack[0](eye)


def test_on_a_gpu_codes_are_stacked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the kernel is given: codes of one kind in one tensor; the same values as on CPU."""
    coded = gpt_oss(tmp_path)
    shard = Shard("model.layers.0.mlp.experts.gate_up_proj", 128, 64, None, None, True)
    w = Checkpoint(coded, dtype=torch.bfloat16)
    plain = quant.stack(w, 5, shard, alternate=True)
    monkeypatch.setattr(_stack, "_goes_with", lambda matrix, held, w: True)
    before = w.parameter_bytes
    stack = quant.stack(w, 5, shard, alternate=True)
    w.close()
    assert isinstance(plain, torch.Tensor)
    assert isinstance(stack, w4a16.Coded)
    for n in range(5):
        assert torch.equal(w4a16.dequantise(one(stack, n), torch.bfloat16), plain[n])
    assert w.parameter_bytes - before == stack.nbytes


def test_experts_of_two_kinds_become_values(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    w = Checkpoint(write(tmp_path / "m", {"quant_method": "gptq"}, {"a": torch.zeros(1)}))
    made = [mxfp4_like(n) for n in range(3)]
    parts: list[Any] = [[made[0]], [made[1]], [torch.ones(4, 64)]]
    monkeypatch.setattr(_stack, "_goes_with", lambda matrix, held, w: True)
    found = _stack.collect(w, 3, (4, 64), lambda n: parts[n])
    w.close()
    assert isinstance(found, torch.Tensor)
    for n in range(2):
        assert torch.equal(found[n], w4a16.dequantise(made[n], torch.float32))
    assert torch.equal(found[2], torch.ones(4, 64))


def mxfp4_like(seed: int) -> w4a16.Coded:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (4, 64), generator=generator).to(torch.uint8)
    table = torch.tensor(mxfp4.E2M1)
    return _coded.grouped(codes, torch.rand(4, 2), torch.arange(64) // 32, table=table)


@pytest.mark.parametrize(
    ("name", "family", "variant"),
    [
        ("torchao-int4", "llama", "biases"),
        ("hqq-4bit", "llama", "biases"),
        ("fp8-block", "qwen3_moe", "plain"),
    ],
)
def test_an_adapter_goes_on_top(tmp_path: Path, name: str, family: str, variant: str) -> None:
    """The answer is that of the values with the adapter added to them."""
    coded = quantized(tmp_path, name, family, variant, moe_intermediate_size=64)
    shapes = {
        f"model.layers.{n}.self_attn.{part}": size
        for n in range(2)
        for part, size in {"q_proj": (128, 64), "v_proj": (64, 64), "o_proj": (64, 128)}.items()
    }
    deltas = adapters.write(tmp_path / "adapter", shapes)
    driver = adapters.Adapted(coded)
    driver.bank.register("a", str(tmp_path / "adapter"))
    ids = list(range(11))
    found, base = driver.adapted([(0, ids, "a"), (1, ids, None)], "joined")
    zoo.edit_tensors(
        tmp_path / "plain",
        lambda t: t | {f"{m}.weight": t[f"{m}.weight"] + delta for m, delta in deltas.items()},
    )
    (wanted,) = Driver(tmp_path / "plain").step([(0, ids)])
    assert off(found, wanted) < 4e-2
    assert off(base, wanted) > 0.2
