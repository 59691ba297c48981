"""Attention whose heads share one key per token, the latent and a rotated part, in plain torch.

A layer's cache is one tensor [num_blocks * block_size, latent + rotated]: a row is a token's key,
and the first `latent` columns of it are its value. Where a sequence's tokens lie, and which dtypes
the cache may have, is as for `paged_attention`; this step's keys are in the cache already.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Options:
    """What the layer is. Key i is visible to query j when i <= j."""

    block_size: int
    latent: int
    scale: float


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query per sequence, its last token: q [sequences, heads, latent + rotated].

    block_tables [sequences, pages] and context_lens [sequences] are int32; a sequence of length 0
    is padding: zeros. Returns [sequences, heads * latent].
    """
    starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device)
    return prefill(q, cache, block_tables, starts, context_lens, options, out=out)


def prefill(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Any number of queries per sequence, its last tokens: q [tokens, heads, latent + rotated].

    Sequence b has the rows cu_seqlens[b] to cu_seqlens[b + 1] of q; both and block_tables are
    int32. Rows behind the last sequence are padding: zeros. Returns [tokens, heads * latent].
    """
    out = q.new_empty((len(q), q.shape[1] * options.latent)) if out is None else out
    out.zero_()
    starts = cu_seqlens.tolist()
    for row, length in enumerate(context_lens.tolist()):
        own = slice(starts[row], starts[row + 1])
        if own.start == own.stop or not length:
            continue
        tokens = torch.arange(length, device=cache.device)
        pages = block_tables[row].long()[tokens // options.block_size]
        keys = cache[pages * options.block_size + tokens % options.block_size].float()
        scores = torch.einsum("qhd,kd->hqk", q[own].float(), keys) * options.scale
        hidden = tokens > tokens[length - (own.stop - own.start) :, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(2)
        y = torch.einsum("hqk,kd->qhd", weights, keys[:, : options.latent])
        out[own] = y.flatten(1).to(q.dtype)
    return out
