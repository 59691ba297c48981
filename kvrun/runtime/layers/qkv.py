"""The ways in which files lay out query, key and value rows, as shards of [q; k; v]."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvrun.errors import BadCheckpoint
from kvrun.runtime.checkpoint import Shard as Shard  # families take it from here
from kvrun.runtime.source import Ranges

if TYPE_CHECKING:
    from kvrun.runtime.checkpoint import Checkpoint


@dataclass(frozen=True)
class Heads:
    """Attention heads of the whole model, and those of this rank as ranges of them."""

    heads: int
    kv_heads: int
    head_dim: int
    mine: tuple[int, int]
    mine_kv: tuple[int, int]

    @property
    def count(self) -> int:
        return self.mine[1] - self.mine[0]

    @property
    def kv_count(self) -> int:
        return self.mine_kv[1] - self.mine_kv[0]

    def scaled(self, heads: tuple[int, int], offset: int = 0) -> Ranges:
        """Rows of a range of heads that starts at row `offset`."""
        return ((offset + heads[0] * self.head_dim, offset + heads[1] * self.head_dim),)


def cut_heads(w: "Checkpoint", heads: int, kv_heads: int, head_dim: int) -> Heads:
    if heads % kv_heads:
        raise BadCheckpoint(f"{heads} attention heads cannot share {kv_heads} key/value heads.")
    group = w.group
    return Heads(
        heads,
        kv_heads,
        head_dim,
        group.cut(heads, "attention heads"),
        group.cut_kv(heads, kv_heads),
    )


def separate(h: Heads, hidden: int, q: str, k: str, v: str) -> list[Shard]:
    """Three tensors."""
    size, size_kv = h.heads * h.head_dim, h.kv_heads * h.head_dim
    return [
        Shard(q, size, hidden, rows=h.scaled(h.mine)),
        Shard(k, size_kv, hidden, rows=h.scaled(h.mine_kv)),
        Shard(v, size_kv, hidden, rows=h.scaled(h.mine_kv)),
    ]


def packed(h: Heads, hidden: int, name: str) -> list[Shard]:
    """One tensor: all queries, then all keys, then all values."""
    size, size_kv = h.heads * h.head_dim, h.kv_heads * h.head_dim
    rows = (
        h.scaled(h.mine)
        + h.scaled(h.mine_kv, offset=size)
        + h.scaled(h.mine_kv, offset=size + size_kv)
    )
    return [Shard(name, size + 2 * size_kv, hidden, rows=rows)]


def in_two(h: Heads, hidden: int, queries: str, kv: str) -> list[Shard]:
    """Two tensors: all queries, and the only key and value head."""
    size = h.heads * h.head_dim
    return [
        Shard(queries, size, hidden, rows=h.scaled(h.mine)),
        Shard(kv, 2 * h.head_dim, hidden),
    ]


def grouped(h: Heads, hidden: int, name: str) -> list[Shard]:
    """One tensor: for each key/value head its queries, then its key, then its value.

    With as many key/value heads as heads this is [q, k, v] per head.
    """
    share = h.heads // h.kv_heads
    group = (share + 2) * h.head_dim
    queries: Ranges = ()
    for head in range(*h.mine):
        start = (head // share) * group + (head % share) * h.head_dim
        queries += ((start, start + h.head_dim),)
    kv: Ranges = ()
    for part in (share, share + 1):
        for head in range(*h.mine_kv):
            start = head * group + part * h.head_dim
            kv += ((start, start + h.head_dim),)
    return [Shard(name, h.kv_heads * group, hidden, rows=queries + kv)]
