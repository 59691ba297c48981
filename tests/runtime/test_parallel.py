"""The cut of a model for several ranks: parts that make the whole, and two ranks that agree."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvrun.errors import Unsupported
from kvrun.runtime.checkpoint import Checkpoint, Shard
from kvrun.runtime.layers.qkv import cut_heads, grouped, packed, separate
from kvrun.runtime.parallel import Group
from tests.runtime.driver import Driver
from tests.runtime.models import zoo


def test_ranges_are_even_and_complete() -> None:
    assert [Group(rank, 4).cut(12) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    with pytest.raises(Unsupported, match="7"):
        Group(0, 2).cut(7)


def test_kv_heads_are_replicated_when_there_are_fewer_than_ranks() -> None:
    assert [Group(rank, 2).cut_kv(8, 4) for rank in range(2)] == [(0, 2), (2, 4)]
    assert [Group(rank, 4).cut_kv(8, 2) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]
    assert [Group(rank, 2).cut_kv(8, 1) for rank in range(2)] == [(0, 1), (0, 1)]
    with pytest.raises(Unsupported, match="3 key/value heads"):
        Group(0, 2).cut_kv(6, 3)


def test_one_rank_sums_nothing() -> None:
    x = torch.randn(3)
    assert Group().all_reduce(x) is x
    with pytest.raises(Unsupported):
        Group(0, 2).all_reduce(x)


HEADS, DIM, HIDDEN = 4, 2, 6


def matrices(kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v [heads, head_dim, hidden], every row different."""
    total = HEADS + 2 * kv_heads
    rows = torch.arange(total * DIM * HIDDEN, dtype=torch.float32).view(total, DIM, HIDDEN)
    return rows[:HEADS], rows[HEADS : HEADS + kv_heads], rows[HEADS + kv_heads :]


def checkpoint(folder: Path, values: dict[str, torch.Tensor], group: Group) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "num_hidden_layers": 1}))
    values = {f"{name}.weight": tensor.contiguous() for name, tensor in values.items()}
    save_file(values, folder / "model.safetensors")
    return Checkpoint(folder, group=group)


@pytest.mark.parametrize("layout", ["separate", "packed", "grouped"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_layout_gives_each_rank_its_heads(
    tmp_path: Path, layout: str, kv_heads: int, size: int
) -> None:
    q, k, v = matrices(kv_heads)
    share = HEADS // kv_heads
    per_kv = [
        torch.cat([q[i * share : (i + 1) * share], k[i : i + 1], v[i : i + 1]])
        for i in range(kv_heads)
    ]
    files = {
        "separate": {"q": q.flatten(0, 1), "k": k.flatten(0, 1), "v": v.flatten(0, 1)},
        "packed": {"qkv": torch.cat([q, k, v]).flatten(0, 1)},
        "grouped": {"qkv": torch.cat(per_kv).flatten(0, 1)},
    }
    whole_q = []
    for rank in range(size):
        w = checkpoint(tmp_path, files[layout], Group(rank, size))
        h = cut_heads(w, HEADS, kv_heads, DIM)
        shards = {
            "separate": lambda h: separate(h, HIDDEN, "q", "k", "v"),
            "packed": lambda h: packed(h, HIDDEN, "qkv"),
            "grouped": lambda h: grouped(h, HIDDEN, "qkv"),
        }[layout](h)
        rows = torch.cat([w.matrix(shard) for shard in shards]).view(-1, DIM, HIDDEN)
        w.close()
        mine = slice(rank * HEADS // size, (rank + 1) * HEADS // size)
        users = sorted({head // share for head in range(mine.start, mine.stop)})
        assert torch.equal(rows, torch.cat([q[mine], k[users], v[users]]))
        whole_q.append(rows[: h.count])
    assert torch.equal(torch.cat(whole_q), q)


def test_two_ranks_shards_make_the_whole(tmp_path: Path) -> None:
    weight = torch.randn(8, 6)
    parts = []
    for rank in range(2):
        w = checkpoint(tmp_path, {"a": weight}, Group(rank, 2))
        rows = Shard("a", 8, 6, rows=(w.group.cut(8),))
        cols = Shard("a", 8, 6, cols=(w.group.cut(6),))
        parts.append((w.matrix(rows), w.matrix(cols)))
        w.close()
    assert torch.equal(torch.cat([rows for rows, _ in parts]), weight)
    assert torch.equal(torch.cat([cols for _, cols in parts], 1), weight)


@dataclass(frozen=True)
class Threads(Group):
    """Ranks that are threads of one process and sum through a shared list."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    places: list[torch.Tensor] = field(default_factory=list)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.places[self.rank] = x
        self.barrier.wait(timeout=30)
        total = torch.stack(self.places).sum(0)
        self.barrier.wait(timeout=30)
        return total


@pytest.mark.parametrize(
    ("family", "variant"),
    [("llama", "v2"), ("llama", "v3.1"), ("llama", "biases"), ("qwen3", "plain"),
     ("qwen3", "window"), ("gemma2", "plain"), ("gemma2", "uncapped")],
)  # fmt: skip
def test_two_ranks_give_the_logits_of_one(tmp_path: Path, family: str, variant: str) -> None:
    zoo.make(tmp_path, family, variant)
    work = [[(0, list(range(11))), (1, list(range(40, 45)))], [(0, [7]), (1, [9])]]
    wanted = [torch.cat(Driver(tmp_path).step(work[0]))]
    barrier, places = threading.Barrier(2), [torch.empty(0)] * 2

    def run(rank: int) -> list[torch.Tensor]:
        driver = Driver(tmp_path, group=Threads(rank, 2, barrier, places))
        return [torch.cat(driver.step(step)) for step in work]

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    alone = Driver(tmp_path)
    wanted = [torch.cat(alone.step(step)) for step in work]
    for a, b, one in zip(first, second, wanted, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, one, rtol=0.0, atol=1e-4)
