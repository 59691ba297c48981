"""A and B of every layout of a base matrix, whole and cut for several ranks; what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvrun.errors import BadCheckpoint, KvrunError, NotFound, Unsupported
from kvrun.runtime.batch import Batch
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.kernels.spread import Target
from kvrun.runtime.layers import qkv
from kvrun.runtime.layers.linear import Linear, split_cols
from kvrun.runtime.lora import adapter
from kvrun.runtime.lora.adapter import AdapterFolder
from kvrun.runtime.lora.sites import Sites
from kvrun.runtime.lora.sources import open_source
from kvrun.runtime.parallel import Group
from tests.runtime.lora.adapters import edit, make_bank, ready, rows_of, write
from tests.runtime.lora.test_parity import FORMS

HEADS, DIM, IN = 4, 8, 24
NAMES = {
    "separate": lambda kv: {"q": HEADS * DIM, "k": kv * DIM, "v": kv * DIM},
    "packed": lambda kv: {"W_pack": (HEADS + 2 * kv) * DIM},
    "grouped": lambda kv: {"query_key_value": (HEADS + 2 * kv) * DIM},
}


def file_order(layout: str, kv: int) -> torch.Tensor:
    """Of [q; k; v], all heads: which row of the file (tensors one after the other) each is."""
    rows = torch.arange((HEADS + 2 * kv) * DIM)
    if layout != "grouped":
        return rows
    share = HEADS // kv
    groups = rows.view(kv, share + 2, DIM)
    return torch.cat(
        [groups[:, :share].flatten(), groups[:, -2].flatten(), groups[:, -1].flatten()]
    )


class Alone(Group):
    """A rank whose peers are not there: its part of a sum is all it gets."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x


def linear(
    folder: Path, shards: Any, group: Group, adapter: Path, x: torch.Tensor, **options: Any
) -> torch.Tensor:
    """One product of this rank, all rows with the adapter but the last."""
    w = Checkpoint(folder, group=group, **options)
    layer = Linear(w, *shards(w))
    w.close()
    bank = make_bank(w.products)
    bank.register("it", str(adapter))
    adapted = bank.find("it")
    assert adapted
    slot = ready(bank, adapted).slot
    found = []
    for form in FORMS:
        batch: Any = Batch(*[None] * 8, [], [], 4, None)  # type: ignore[arg-type,list-item]
        batch.lora = rows_of(bank, [slot] * (len(x) - 1) + [0], form)
        found.append(layer(x.clone(), batch))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=1e-5)
    return found[0]


def base(folder: Path, sizes: dict[str, tuple[int, int]]) -> dict[str, torch.Tensor]:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weights = {name: torch.randn(shape) for name, shape in sizes.items()}
    save_file({f"{name}.weight": w for name, w in weights.items()}, folder / "model.safetensors")
    return weights


@pytest.mark.parametrize("layout", NAMES)
@pytest.mark.parametrize("kv", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_queries_keys_and_values(tmp_path: Path, layout: str, kv: int, size: int) -> None:
    sizes = {name: (out, IN) for name, out in NAMES[layout](kv).items()}
    weights = base(tmp_path / "base", sizes)
    deltas = write(tmp_path / "adapter", sizes, rank=3, alpha=6)
    x = torch.randn(3, IN)
    whole = torch.cat([weights[n] + deltas[n] for n in sizes])[file_order(layout, kv)]
    plain = torch.cat([weights[n] for n in sizes])[file_order(layout, kv)]
    parts = {"separate": qkv.separate, "packed": qkv.packed, "grouped": qkv.grouped}
    for rank in range(size):

        def shards(w: Checkpoint) -> list[Shard]:
            return parts[layout](qkv.cut_heads(w, HEADS, kv, DIM), IN, *sizes)  # type: ignore[operator]

        found = linear(tmp_path / "base", shards, Alone(rank, size), tmp_path / "adapter", x)
        q = slice(rank * HEADS * DIM // size, (rank + 1) * HEADS * DIM // size)
        head = rank * kv // size  # a head of keys is on each rank that has queries for it
        count = max(1, kv // size) * DIM
        k, v = (slice(at + head * DIM, at + head * DIM + count)
                for at in (HEADS * DIM, (HEADS + kv) * DIM))  # fmt: skip
        mine = torch.cat([torch.arange(len(whole))[part] for part in (q, k, v)])
        torch.testing.assert_close(found[:2], x[:2] @ whole[mine].t(), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found[2:], x[2:] @ plain[mine].t(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_columns_sum_to_the_whole(tmp_path: Path, size: int) -> None:
    """Each rank adds its columns' part before the sum over ranks."""
    weights = base(tmp_path / "base", {"o": (IN, 32)})
    deltas = write(tmp_path / "adapter", {"o": (IN, 32)}, rank=5)
    x = torch.randn(3, 32)
    total = torch.zeros(3, IN)
    for rank in range(size):
        mine = x[:, rank * 32 // size : (rank + 1) * 32 // size].contiguous()
        total += linear(
            tmp_path / "base", lambda w: [split_cols(w, "o", IN, 32)], Alone(rank, size),
            tmp_path / "adapter", mine,
        )  # fmt: skip
    torch.testing.assert_close(total[:2], x[:2] @ (weights["o"] + deltas["o"]).t())
    torch.testing.assert_close(total[2:], x[2:] @ weights["o"].t())


def test_two_halves_of_one_matrix(tmp_path: Path) -> None:
    """gate_up_proj in one tensor, read as two shards: both take their rows of one B."""
    weights = base(tmp_path / "base", {"gate_up": (32, IN)})
    deltas = write(tmp_path / "adapter", {"gate_up": (32, IN)}, rank=2)
    halves = [Shard("gate_up", 32, IN, rows=((16, 32),)), Shard("gate_up", 32, IN, rows=((0, 16),))]
    x = torch.randn(4, IN)
    found = linear(tmp_path / "base", lambda w: halves, Alone(), tmp_path / "adapter", x)
    expected = (x[:3] @ (weights["gate_up"] + deltas["gate_up"]).t()).roll(16, 1)
    torch.testing.assert_close(found[:3], expected, atol=1e-4, rtol=1e-4)


def dora(folder: Path, magnitudes: dict[str, torch.Tensor]) -> Path:
    """Make an adapter DoRA's."""
    names = {f"base_model.model.{n}.lora_magnitude_vector": m for n, m in magnitudes.items()}
    return edit(folder, lambda tensors: {**tensors, **names}, use_dora=True)


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "nf4"])
def test_norms_are_those_of_what_is_multiplied(tmp_path: Path, quantize: str | None) -> None:
    """q has magnitudes, k has none; of rounded weights, the norm is that of the rounded ones."""
    weights = base(tmp_path / "base", {"q": (64, 128), "k": (32, 128)})
    deltas = write(tmp_path / "adapter", {"q": (64, 128)}, rank=3)
    magnitude = torch.rand(64) + 0.5
    dora(tmp_path / "adapter", {"q": magnitude})
    shards = [Shard("q", 64, 128), Shard("k", 32, 128)]

    def found(x: torch.Tensor, adapter: Path) -> torch.Tensor:
        options: Any = {"quantize": quantize}
        return linear(tmp_path / "base", lambda w: shards, Alone(), adapter, x, **options)

    plain = write(tmp_path / "none", {"q": (64, 128)}, spread=0.0)
    assert not plain["q"].any()
    rounded = found(torch.eye(128), tmp_path / "none").t()
    assert (rounded[:64] - weights["q"]).abs().max() < 0.5
    changed = rounded[:64] + deltas["q"]
    factor = magnitude / changed.norm(dim=1)
    x = torch.randn(3, 128)
    y = found(x, tmp_path / "adapter")
    close: Any = {"atol": 2e-2 if quantize == "int8" else 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(y[:2, :64], x[:2] @ (factor[:, None] * changed).t(), **close)
    torch.testing.assert_close(y[:2, 64:], x[:2] @ rounded[64:].t(), **close)
    torch.testing.assert_close(y[2:], x[2:] @ rounded.t(), **close)


def test_rows_of_a_grouped_layout_in_plain_order_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "Target", lambda place, dim, ranges: Target(place, dim))
    with pytest.raises(AssertionError):
        test_queries_keys_and_values(tmp_path, "grouped", 2, 1)


def test_key_rows_that_are_not_repeated_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Group, "cut_kv", lambda self, heads, kv: (self.rank % kv, self.rank % kv + 1)
    )
    with pytest.raises(AssertionError):
        test_queries_keys_and_values(tmp_path, "separate", 2, 4)


# -- what cannot be served ----------------------------------------------------------------------

SITES = Sites([(Shard("model.layers.0.q_proj", 16, 8),)])
A, B = (f"base_model.model.model.layers.0.q_proj.lora_{side}.weight" for side in "AB")
BEYOND: dict[str, Any] = {
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "layer_replication": [[0, 2]],
    "some_new_variant": {"x": 1},
}


@pytest.mark.parametrize("key", BEYOND)
def test_what_no_step_can_do_is_refused_by_its_key(tmp_path: Path, key: str) -> None:
    write(tmp_path, {"model.layers.0.q_proj": (16, 8)}, **{key: BEYOND[key]})
    with pytest.raises(Unsupported, match="cannot be served") as caught:
        AdapterFolder(tmp_path, SITES)
    assert key in caught.value.cause


def _damage(kind: str, folder: Path) -> None:
    config = folder / "adapter_config.json"
    if kind == "no config":
        config.unlink()
    elif kind == "not json":
        config.write_text("{")
    elif kind == "a list":
        config.write_text("[]")
    elif kind == "pickled":
        (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    elif kind == "pissa":
        edit(folder, init_lora_weights="pissa")
    elif kind == "alpha":
        edit(folder, lora_alpha="eight")
    elif kind == "pattern":
        edit(folder, rank_pattern={"(": 3})
    elif kind == "only a":
        edit(folder, lambda t: {A: t[A]})
    elif kind == "nothing":
        edit(folder, lambda t: {})
    elif kind == "integers":
        edit(folder, lambda t: {A: t[A].int(), B: t[B]})
    elif kind == "vector":
        edit(folder, lambda t: {A: t[A].flatten(), B: t[B]})
    elif kind == "unknown tensor":
        name = "base_model.model.model.layers.0.q_proj.lora_C"
        edit(folder, lambda t: {**t, name: torch.ones(16)})
    elif kind == "twice":
        edit(folder, lambda t: {**t, A.replace(".weight", ".x.weight"): t[A].clone()})
    elif kind == "large":
        rank = 513
        edit(folder, lambda t: {A: torch.ones(rank, 8), B: torch.ones(16, rank)}, r=rank)


DAMAGE: dict[str, tuple[type[KvrunError], str]] = {
    "no config": (NotFound, "adapter_config.json"),
    "not json": (BadCheckpoint, "cannot be read"),
    "a list": (BadCheckpoint, "not a JSON object"),
    "pickled": (Unsupported, "pickled"),
    "pissa": (Unsupported, "base model as well"),
    "alpha": (BadCheckpoint, "lora_alpha = eight"),
    "pattern": (BadCheckpoint, "no pattern"),
    "only a": (BadCheckpoint, "lacks lora_B"),
    "nothing": (BadCheckpoint, "empty"),
    "integers": (BadCheckpoint, "I32"),
    "vector": (BadCheckpoint, "not a matrix"),
    "unknown tensor": (Unsupported, "lora_C"),
    "twice": (BadCheckpoint, "twice"),
    "large": (Unsupported, "512 is the largest"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_folders(tmp_path: Path, kind: str) -> None:
    write(tmp_path, {"model.layers.0.q_proj": (16, 8)})
    AdapterFolder(tmp_path, SITES)
    _damage(kind, tmp_path)
    error, words = DAMAGE[kind]
    with pytest.raises(error) as caught:
        AdapterFolder(tmp_path, SITES)
    assert words in str(caught.value)


def test_values_that_overflow_in_the_models_dtype(tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.0.q_proj": (16, 8)}, alpha=1e7)
    folder = AdapterFolder(tmp_path, SITES)
    folder.read(torch.float32)
    with pytest.raises(BadCheckpoint, match="not finite") as caught:
        folder.read(torch.float16)
    assert "float16" in caught.value.cause


def test_random_adapters_share_their_memory() -> None:
    """Each seed has values of its own, the same every time; thousands take the room of one."""
    read = {
        seed: open_source(f"dummy:4:{seed}", SITES).read(torch.bfloat16)[0] for seed in range(20)
    }
    again = open_source("dummy:4:7", SITES).read(torch.bfloat16)[0]
    assert torch.equal(again, read[7])
    assert len({tuple(flat.tolist()) for flat in read.values()}) == 20
    assert len({flat.untyped_storage().data_ptr() for flat in read.values()}) == 1
    assert all(flat.data_ptr() % 16 == 0 and flat.std() > 5e-3 for flat in read.values())
    larger = open_source("dummy:8:7", SITES).read(torch.bfloat16)[0]
    assert torch.equal(larger[: len(again)], again)


def test_a_file_that_is_replaced_is_not_read_as_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "a", {"model.layers.0.q_proj": (16, 8)}, seed=1)
    write(tmp_path / "b", {"model.layers.0.q_proj": (16, 8)}, seed=2)
    folder = AdapterFolder(tmp_path / "a", SITES)
    first = folder.read(torch.float32)[1]
    (tmp_path / "b" / "adapter_model.safetensors").replace(
        tmp_path / "a" / "adapter_model.safetensors"
    )
    with pytest.raises(BadCheckpoint, match="has changed"):
        folder.read(torch.float32)
    assert AdapterFolder(tmp_path / "a", SITES).read(torch.float32)[1] != first


def test_the_identity_is_that_of_the_content(tmp_path: Path) -> None:
    for name, changes in {"a": {}, "b": {}, "alpha": {"alpha": 9}, "seed": {"seed": 5}}.items():
        write(tmp_path / name, {"model.layers.0.q_proj": (16, 8)}, **changes)
    ids = {n: AdapterFolder(tmp_path / n, SITES).read(torch.float32)[1] for n in ("a", "b")}
    assert ids["a"] == ids["b"]
    others = {AdapterFolder(tmp_path / n, SITES).read(torch.float32)[1] for n in ("alpha", "seed")}
    assert len({*others, *ids.values()}) == 3
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["r"] == 4
