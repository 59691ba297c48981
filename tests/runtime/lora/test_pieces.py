"""An adapter's file is read in pieces by several threads: the same values, each rounded once."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kvrun.errors import BadCheckpoint
from kvrun.runtime.checkpoint import Shard
from kvrun.runtime.kernels import spread
from kvrun.runtime.lora import adapter, pieces
from kvrun.runtime.lora.adapter import AdapterFolder
from kvrun.runtime.lora.sites import Sites
from tests.runtime.lora.adapters import edit, write

# 13 and 5 leave gaps between matrices that begin at multiples of 8 elements.
SHAPES = {f"model.layers.{n}.{name}": size for n in range(3) for name, size in
          {"q_proj": (40, 13), "k_proj": (5, 13), "o_proj": (13, 40)}.items()}  # fmt: skip
SITES = Sites([
    shards
    for n in range(3)
    for shards in (
        tuple(Shard(f"model.layers.{n}.{name}", *SHAPES[f"model.layers.{n}.{name}"])
              for name in ("q_proj", "k_proj")),
        (Shard(f"model.layers.{n}.o_proj", 13, 40),),
    )
])  # fmt: skip
STORED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def stored_as(folder: Path, *dtypes: torch.dtype) -> Path:
    """The folder's tensors in these dtypes, in turns."""
    write(folder, SHAPES, rank=3, alpha=4)
    return edit(folder, lambda tensors: {
        name: tensor.to(dtypes[n % len(dtypes)]) for n, (name, tensor) in enumerate(tensors.items())
    })  # fmt: skip


def check(folder: Path, dtype: torch.dtype) -> None:
    """What has been read is A, and B · scale in fp32 or wider, rounded to the dtype."""
    opened = AdapterFolder(folder, SITES)
    flat, _ = opened.read(dtype)
    tensors = load_file(folder / "adapter_model.safetensors")
    for place in opened.ranks:
        a, b = SITES.views(opened.layout, flat, place)
        name = f"base_model.model.{SITES.shard(place).name}.lora_"
        assert torch.equal(a, tensors[f"{name}A.weight"].to(dtype))
        stored = tensors[f"{name}B.weight"]
        wide = stored if stored.dtype == torch.float64 else stored.float()
        assert torch.equal(b, (wide * (4 / 3)).to(dtype).t())


@pytest.mark.parametrize("piece", [1, 700, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_stored_dtype(
    tmp_path: Path, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "_PIECE", piece)
    monkeypatch.setattr(spread, "_GRAIN", 7)
    for n, stored in enumerate([(d,) for d in STORED if d != torch.float64] + [STORED]):
        check(stored_as(tmp_path / str(n), *stored), dtype)


def test_gaps_hold_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = AdapterFolder(stored_as(tmp_path, torch.float32), SITES)
    monkeypatch.setattr(np, "empty", lambda size, dtype: np.full(size, 255, dtype))
    flat, _ = folder.read(torch.float32)
    values = sum(tensor.numel() for tensor in load_file(tmp_path / adapter.WEIGHTS).values())
    assert len(flat) > values
    assert flat.isfinite().all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_one_value_that_is_not_finite(tmp_path: Path, wrong: float) -> None:
    stored_as(tmp_path, torch.bfloat16)

    def spoil(tensors: dict[str, Any]) -> dict[str, Any]:
        tensors["base_model.model.model.layers.2.o_proj.lora_B.weight"][12, 2] = wrong
        return tensors

    with pytest.raises(BadCheckpoint, match="not finite"):
        AdapterFolder(edit(tmp_path, spoil), SITES).read(torch.bfloat16)


def test_the_identity_covers_every_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_PIECE", 100)
    stored_as(tmp_path, torch.bfloat16)
    file = tmp_path / adapter.WEIGHTS
    tensors = load_file(file)
    found = {AdapterFolder(tmp_path, SITES).read(torch.bfloat16)[1]}
    for tensor in tensors.values():
        tensor[-1, -1] += 1
        save_file(tensors, file)
        found.add(AdapterFolder(tmp_path, SITES).read(torch.bfloat16)[1])
    save_file(tensors, file, {"format": "pt"})  # the header alone differs
    found.add(AdapterFolder(tmp_path, SITES).read(torch.bfloat16)[1])
    assert len(found) == 2 + len(tensors)


def test_a_file_that_ends_or_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = AdapterFolder(stored_as(tmp_path, torch.float32), SITES)
    real = adapter.lay_in

    def touched(*args: Any, **options: Any) -> Any:
        os.utime(tmp_path / adapter.WEIGHTS, (1, 1))
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda *args: 0)
        with pytest.raises(BadCheckpoint, match="has changed while"):
            folder.read(torch.float32)
    folder.read(torch.float32)
    monkeypatch.setattr(adapter, "lay_in", touched)
    with pytest.raises(BadCheckpoint, match="has changed while"):
        folder.read(torch.float32)
