"""MLA: what the cache keeps, the products it absorbs, and the kernels that attend to it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvrun.folder import load
from kvrun.runtime import quant
from kvrun.runtime.attention import triton as backend
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.tensors import bytes_per_block
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.device import TRITON
from kvrun.runtime.layers.mla import Absorbed
from kvrun.runtime.models import build
from kvrun.runtime.parallel import Group
from kvrun.runtime.plan import examine
from tests.runtime.driver import Driver
from tests.runtime.models import zoo
from tests.runtime.models.compare import TOLERANCE, stepwise

RANK, ROTATED, LAYERS = 32, 8, 2  # of the zoo's models


@pytest.mark.parametrize("group", [Group(), Group(1, 2)], ids=["one rank", "two ranks"])
def test_the_cache_keeps_the_latent_on_every_rank(tmp_path: Path, group: Group) -> None:
    zoo.make(tmp_path, "deepseek_v3", "plain")
    driver = Driver(tmp_path, group=group)
    cache = driver.backend.cache
    assert {cache.rows(layer).shape[1] for layer in range(LAYERS)} == {RANK + ROTATED}
    token = LAYERS * (RANK + ROTATED) * 4
    assert bytes_per_block(driver.model.specs, 16, torch.float32) == 16 * token
    assert examine(tmp_path).kv_values == token // 4
    assert {spec.heads for spec in driver.model.specs} == {4 // group.size}


def test_memory_of_weights_is_counted_once(tmp_path: Path) -> None:
    oracle = zoo.make(tmp_path, "deepseek_v3", "plain")
    count = sum(p.numel() for p in oracle.parameters())
    found = Driver(tmp_path).model.parameter_bytes / 4
    assert count <= found <= count * 1.01  # routers' corrections are no parameters


@pytest.mark.parametrize("variant", ["plain", "halves"])
def test_expanded_for_onlookers_is_the_same(tmp_path: Path, variant: str) -> None:
    """`kvrun quantize` sees kv_b at work on latents, and every head's keys and values."""
    oracle = zoo.make(tmp_path, "deepseek_v3", variant)
    checkpoint, seen = Checkpoint(tmp_path), []

    def read(shards: Any, bias: bool) -> Any:
        seen.extend(shard.name.rpartition(".")[2] for shard in shards)
        reader, checkpoint.reader = checkpoint.reader, None
        weight = quant.read(checkpoint, shards, bias)
        checkpoint.reader = reader
        return weight

    checkpoint.reader = read
    driver = Driver(tmp_path)
    driver.model = build(checkpoint)
    specs = driver.model.specs
    assert {spec.latent for spec in specs} == {None}
    assert "kv_b_proj" in seen
    cache = type(driver.backend.cache)
    driver.backend.cache = cache(specs, 200, 4, torch.float32, torch.device("cpu"))
    assert stepwise(driver, oracle) <= TOLERANCE


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_rounded_kv_b_is_absorbed_as_it_is_rounded(tmp_path: Path, bits: str) -> None:
    zoo.make(tmp_path, "deepseek_v3", "plain")
    shard = Shard("model.layers.0.self_attn.kv_b_proj", 4 * (16 + 20), RANK)
    halves = []
    for rounding in (None, bits):
        w = Checkpoint(tmp_path, quantize=rounding)
        halves.append(Absorbed(w, shard, 4, 16))
        w.close()
    q, y, out = torch.randn(7, 4, 16), torch.randn(7, 4, RANK), torch.empty(2, 7, 4, RANK)
    for half, place in zip(halves, out, strict=True):
        half.queries(q, Batch, place)  # type: ignore[arg-type]
    exact, rounded = (half.values(y, Batch) for half in halves)  # type: ignore[arg-type]
    for found, wanted in ((out[1], out[0]), (rounded, exact)):
        off = float((found - wanted).norm() / wanted.norm())
        assert 1e-4 < off < {"int8": 0.02, "int4": 0.2}[bits]


@pytest.mark.parametrize(
    ("family", "variant"),
    [("deepseek_v3", "plain"), ("deepseek_v2", "lite"), ("llama4_text", "scout")],
)
def test_the_triton_backend_in_its_interpreter(
    tmp_path: Path, family: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Latents, and attention in chunks, by kvrun's own kernels."""
    monkeypatch.setattr(backend, "kernel", lambda name, device: load(TRITON, name))
    oracle = zoo.make(tmp_path, family, variant)
    driver = Driver(tmp_path, block_size=16, num_blocks=20)
    for spec in driver.model.specs:
        assert backend.Attention.reject(spec, torch.device("cuda")) is None
    driver.backend = backend.Attention(driver.backend.cache, torch.float32)  # type: ignore[assignment]
    assert stepwise(driver, oracle) <= TOLERANCE
