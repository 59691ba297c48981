"""How one step's sequences are grouped for dense attention, and the masks of each group."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from kvrun.runtime.attention import AttentionSpec
    from kvrun.runtime.batch import Batch
    from kvrun.runtime.cache.tensors import KVCache

# A group of its own costs about as much as gathering this many padding tokens.
_PADDING = 512


@dataclass
class Group:
    """`size` sequences, each padded to `queries` query rows and `keys` keys.

    Padding queries repeat a sequence's last one; padding keys lie beyond every query's position.
    """

    size: int
    queries: int
    keys: int
    positions: torch.Tensor  # [size * queries]
    tables: torch.Tensor  # [size * pages] block ids
    first_block: int | None  # of the only sequence, where its blocks lie in one stretch
    aligned: bool  # every sequence has `queries` queries and `keys` keys
    dtype: torch.dtype
    rows: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # of the batch
    kept: torch.Tensor | None = None  # which of size * queries are no padding; None: all
    targets: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # rows they are
    _masks: dict[tuple[int | None, int | None, int, int], torch.Tensor | None] = field(
        default_factory=dict
    )

    def gather(self, cache: "KVCache", spec: "AttentionSpec") -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, values [size, kv_heads, keys, head_dim]; values of a latent are `latent` wide."""
        if self.first_block is not None:
            start = self.first_block * cache.block_size
            found = cache.rows(spec.layer)[start : start + self.keys]
        else:
            found = cache.gather(spec.layer, self.tables)
        found = found.to(self.dtype)
        if spec.latent is not None:
            keys = found.view(self.size, 1, -1, spec.head_dim)[:, :, : self.keys]
            return keys, keys[..., : spec.latent]
        found = found.view(self.size, -1, 2, spec.kv_heads, spec.head_dim).permute(2, 0, 3, 1, 4)
        k, v = found.unbind(0)
        return (k, v) if k.shape[2] == self.keys else (k[:, :, : self.keys], v[:, :, : self.keys])

    def mask(self, spec: "AttentionSpec") -> torch.Tensor | None:
        """What to add to scaled scores: [size, 1 or heads, queries, keys].

        None when every query sees all keys, or plain causality says it all (`queries` == `keys`).
        """
        window = spec.window if spec.window is not None and spec.window < self.keys else None
        chunk = spec.chunk if spec.chunk is not None and spec.chunk < self.keys else None
        key = (window, chunk, id(spec.alibi), id(spec.relative))
        if key not in self._masks:
            plain = self.aligned and (self.queries in (1, self.keys) or not spec.causal)
            bound = window is not None or chunk is not None
            needed = not plain or bound or spec.alibi is not None or spec.relative is not None
            found = self._mask(window, chunk, spec.alibi, spec.relative) if needed else None
            self._masks[key] = found
        return self._masks[key]

    def causal_mask(self) -> torch.Tensor:
        """The mask that `mask` leaves out when plain causality says it all."""
        key = (None, None, -1, -1)
        if key not in self._masks:
            self._masks[key] = self._mask(None, None, None, None)
        mask = self._masks[key]
        assert mask is not None
        return mask

    def _mask(
        self,
        window: int | None,
        chunk: int | None,
        alibi: torch.Tensor | None,
        relative: torch.Tensor | None,
    ) -> torch.Tensor:
        keys = torch.arange(self.keys, device=self.positions.device)
        behind = self.positions.view(self.size, 1, self.queries, 1) - keys
        hidden = behind < 0
        if window is not None:
            hidden |= behind >= window
        if chunk is not None:
            hidden |= keys // chunk < self.positions.view(self.size, 1, self.queries, 1) // chunk
        if relative is not None:
            distance = behind[:, 0].clamp(0, relative.shape[1] - 1)
            bias = relative.to(self.dtype)[:, distance].transpose(0, 1).contiguous()
            return bias.masked_fill_(hidden, float("-inf"))
        if alibi is None:
            bias = torch.zeros(hidden.shape, dtype=self.dtype, device=hidden.device)
        else:
            bias = (alibi.view(-1, 1, 1) * -behind).to(self.dtype)
        return bias.masked_fill_(hidden, float("-inf"))


@dataclass
class Plan:
    """A step's groups; `whole` when one group is the whole batch, row by row, without padding."""

    groups: list[Group]
    whole: Group | None


def make_plan(batch: "Batch", dtype: torch.dtype) -> Plan:
    queries, keys = batch.query_lens_host, batch.context_lens_host
    if len(set(queries)) == 1 and _padding(sorted(keys, reverse=True)) <= _PADDING:
        return Plan([], _whole(batch, dtype))
    return Plan([_group(batch, members, dtype) for members in split(queries, keys)], None)


def split(queries: Sequence[int], keys: Sequence[int]) -> list[list[int]]:
    """Sequences by similar lengths, so that little is padded and few groups are needed.

    Single queries stay among themselves; longer ones are within a factor of two of each other. A
    group ends where the next sequence's padding would cost more than another group.
    """
    order = sorted(range(len(queries)), key=lambda i: (-_bucket(queries[i]), -keys[i], i))
    groups: list[list[int]] = []
    padded = 0
    for i in order:
        first = groups[-1][0] if groups else None
        if first is not None and _bucket(queries[i]) == _bucket(queries[first]):
            padded += keys[first] - keys[i]
            if padded <= _PADDING:
                groups[-1].append(i)
                continue
        groups.append([i])
        padded = 0
    return groups


def _bucket(queries: int) -> int:
    return (queries - 1).bit_length()


def _padding(keys: Sequence[int]) -> int:
    return sum(keys[0] - count for count in keys)


def _whole(batch: "Batch", dtype: torch.dtype) -> Group:
    lengths = batch.context_lens_host
    most = max(lengths)
    pages = -(-most // batch.block_size)
    return Group(
        size=len(lengths),
        queries=batch.query_lens_host[0],
        keys=most,
        positions=batch.positions,
        tables=batch.block_tables[:, :pages].reshape(-1),
        first_block=_stretch(batch.block_tables[0, :pages]) if len(lengths) == 1 else None,
        aligned=min(lengths) == most,
        dtype=dtype,
    )


def _group(batch: "Batch", members: list[int], dtype: torch.dtype) -> Group:
    device = batch.ids.device
    counts = torch.tensor([batch.query_lens_host[i] for i in members], device=device)
    lengths = [batch.context_lens_host[i] for i in members]
    queries, most = max(batch.query_lens_host[i] for i in members), max(lengths)
    pages = -(-most // batch.block_size)
    chosen = torch.tensor(members, device=device)
    column = torch.arange(queries, device=device)
    real = column < counts.view(-1, 1)
    rows = batch.cu_seqlens[chosen].view(-1, 1) + torch.minimum(column, counts.view(-1, 1) - 1)
    rows = rows.view(-1)
    tables = batch.block_tables.index_select(0, chosen)[:, :pages]
    padded = len(rows) != sum(batch.query_lens_host[i] for i in members)
    kept = real.view(-1).nonzero().view(-1) if padded else None
    return Group(
        size=len(members),
        queries=queries,
        keys=most,
        positions=batch.positions.index_select(0, rows),
        tables=tables.reshape(-1),
        first_block=_stretch(tables[0]) if len(members) == 1 else None,
        aligned=not padded and min(lengths) == most,
        dtype=dtype,
        rows=rows,
        kept=kept,
        targets=rows if kept is None else rows.index_select(0, kept),
    )


def _stretch(table: torch.Tensor) -> int | None:
    """The first of block ids that count up by one: such blocks need no gathering."""
    if table.device.type != "cpu":
        return None  # reading it would wait for the device
    ids = table.tolist()
    return ids[0] if ids == list(range(ids[0], ids[0] + len(ids))) else None
