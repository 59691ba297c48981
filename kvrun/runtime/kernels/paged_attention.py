"""Attention over paged keys and values: single queries (`decode`) and runs of them (`prefill`).

A layer's cache is one tensor [num_blocks * block_size, 2 * kv_heads * head_dim]: a row is a token's
keys of all kv heads, then its values. A sequence's token t lies in row
block_tables[sequence, t // block_size] * block_size + t % block_size. This step's keys and values
are in the cache already. The cache has the queries' dtype or is torch.float8_e4m3fn, whose values
count as they are.
"""

from dataclasses import dataclass

import torch

from kvrun.runtime.kernels.rotary import Rotation, rotate_append


@dataclass(frozen=True, eq=False)
class Options:
    """What the layer is; scores are those of `kvrun.runtime.attention.AttentionSpec`.

    Key i is visible to query j when 0 <= j - i (and j - i < window, and i // chunk == j // chunk).
    Unless `causal`, each of a sequence's queries stands where its last key does: they see all keys.
    `softcap` c maps a scaled score s to c·tanh(s / c), before masking. `alibi` [heads] float32 adds
    slope·(i - j) to the score. `sinks` [heads] float32 is one more logit per head whose value is
    dropped.
    """

    block_size: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    alibi: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    chunk: int | None = None
    causal: bool = True


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query per sequence, its last token: q [sequences, heads, head_dim].

    block_tables [sequences, pages] and context_lens [sequences] are int32; lengths count the
    query's own token. A sequence of length 0 is padding: zeros. Returns [sequences, heads *
    head_dim].
    """
    out = q.new_empty((len(q), q.shape[1] * q.shape[2])) if out is None else out
    for row, length in enumerate(context_lens.tolist()):
        if length == 0:
            out[row] = 0
            continue
        keys, values = _gather(cache, block_tables[row], length, options)
        out[row] = _attend(q[row : row + 1], keys, values, options)[0]
    return out


def appends(qkv: torch.Tensor) -> bool:
    """Whether `append_and_decode` is there for these [sequences, heads + 2 kv_heads, head_dim]."""
    return True


def append_and_decode(
    qkv: torch.Tensor,
    rotation: Rotation,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """`rotate_append` of one token per sequence, then `decode` of its queries.

    qkv [sequences, heads + 2 * kv_heads, head_dim] is not to be read afterwards. slot_mapping
    [sequences] int64: where the tokens' keys and values go, which block_tables say as well.
    """
    kv_heads, dim = options.kv_heads, options.head_dim
    rotate_append(qkv.view(len(qkv), -1), rotation, cache, slot_mapping, kv_heads, dim)
    q = qkv[:, : qkv.shape[1] - 2 * kv_heads]
    return decode(q, cache, block_tables, context_lens, options)


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    *,
    max_query_len: int,
    fresh: bool,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Any number of queries per sequence, its last tokens: q [tokens, heads, head_dim].

    Sequence b has the rows cu_seqlens[b] to cu_seqlens[b + 1] of q, none longer than max_query_len;
    cu_seqlens [sequences + 1], block_tables [sequences, pages] and context_lens [sequences] are
    int32. Rows behind the last sequence are padding: zeros. `fresh` promises that no sequence has
    tokens before this step's, so that keys and values are those of k, v [tokens, kv_heads,
    head_dim], as they were before they were stored; it is for causal layers. Returns [tokens,
    heads * head_dim].
    """
    out = q.new_empty((len(q), q.shape[1] * q.shape[2])) if out is None else out
    starts = cu_seqlens.tolist()
    for row, length in enumerate(context_lens.tolist()):
        own = slice(starts[row], starts[row + 1])
        if own.start == own.stop:
            continue
        if fresh:
            keys, values = k[own], v[own]
        else:
            keys, values = _gather(cache, block_tables[row], length, options)
        out[own] = _attend(q[own], keys, values, options)
    out[starts[-1] :] = 0
    return out


def _gather(
    cache: torch.Tensor, table: torch.Tensor, length: int, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's keys and values [length, kv_heads, head_dim], page after page."""
    tokens = torch.arange(length, device=cache.device)
    pages = table.long()[tokens // options.block_size]
    rows = cache[pages * options.block_size + tokens % options.block_size]
    keys, values = rows.view(length, 2, options.kv_heads, options.head_dim).unbind(1)
    return keys, values


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: Options
) -> torch.Tensor:
    """q [queries, heads, head_dim], the last of keys' positions -> [queries, heads * head_dim]"""
    heads, share = q.shape[1], q.shape[1] // options.kv_heads
    keys, values = (x.float().repeat_interleave(share, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    positions = torch.arange(len(keys), device=q.device)
    own = positions[len(keys) - len(q) :] if options.causal else positions[-1:].expand(len(q))
    behind = own[:, None] - positions
    if options.alibi is not None:
        scores = scores - options.alibi.view(heads, 1, 1) * behind
    hidden = behind < 0
    if options.window is not None:
        hidden |= behind >= options.window
    if options.chunk is not None:
        hidden |= own[:, None] // options.chunk != positions // options.chunk
    scores = scores.masked_fill(hidden, float("-inf"))
    if options.sinks is not None:
        sinks = options.sinks.view(heads, 1, 1).expand(heads, len(q), 1)
        scores = torch.cat((scores, sinks), 2)
    weights = scores.softmax(2)[..., : len(keys)]
    return torch.einsum("hqk,khd->qhd", weights, values).flatten(1).to(q.dtype)
