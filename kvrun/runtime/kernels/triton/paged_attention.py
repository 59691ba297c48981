"""Attention over paged keys and values in Triton: which cut suits which shape."""

import torch

from kvrun.runtime.kernels.paged_attention import Options
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.triton import _decode, _prefill
from kvrun.runtime.kernels.triton._device import shared_memory

__all__ = ["Options", "append_and_decode", "decode", "prefill"]

# Up to this many queries of the longest sequence, the heads of a kv head share a tile.
_SHORT = 32
# Up to here smaller tiles are faster: more of them are on the diagonal.
_LONG = 4096


def decode(
    q: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    batch, heads, dim = q.shape
    if out is None:
        out = torch.empty((batch, heads * dim), dtype=q.dtype, device=q.device)
    tiling = decode_tiling(batch, dim, q.dtype)
    _decode.launch(q, cache, block_tables, context_lens, options, out, tiling)
    return out


def appends(qkv: torch.Tensor) -> bool:
    """Whether `append_and_decode` is faster than the two kernels that it stands for."""
    # On an H100, whole steps at 512 tokens: 0.92, 0.93 and 0.95 of the time at 1, 8 and 16 rows of
    # 128 dimensions, 1.00 to 1.01 at 32 and 64; of 256, 1.03 at 64. Layers alone in a graph
    # (`attention_half.py`): 0.85 at 1 row of 256; 0.90 to 0.93 at 32 and 64, but steps show none.
    batch, _, dim = qkv.shape
    wide = batch == 1 and dim <= 256 and qkv.element_size() == 2
    return wide or (batch <= 16 and dim <= 128)


def append_and_decode(
    qkv: torch.Tensor,
    rotation: Rotation,
    slot_mapping: torch.Tensor,
    cache: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    options: Options,
) -> torch.Tensor:
    """As the twin; `rotation` has angles."""
    (batch, heads, dim), dtype = qkv.shape, qkv.dtype
    q = qkv[:, : heads - 2 * options.kv_heads]
    out = torch.empty((batch, q.shape[1] * dim), dtype=dtype, device=qkv.device)
    tiling = append_tiling(batch, dim, dtype)
    newest = _decode.Newest(rotation, slot_mapping)
    _decode.launch(q, cache, block_tables, context_lens, options, out, tiling, newest)
    return out


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
    tokens, heads, dim = q.shape
    if out is None:
        out = torch.empty((tokens, heads * dim), dtype=q.dtype, device=q.device)
    room = shared_memory(q.device)
    tiling = prefill_tiling(max_query_len, heads // options.kv_heads, dim, q.dtype, room)
    _prefill.launch(
        q, k, v, cache, block_tables, cu_seqlens, context_lens, options, fresh, out, tiling
    )
    return out


# Tables as measured on an H100, bf16, 32 and 16 query heads over 8 of 128 dimensions; decode also
# with 8 over 4 of 256.
def decode_tiling(batch: int, dim: int, dtype: torch.dtype) -> _decode.Tiling:
    if dtype is torch.float32:
        return _decode.Tiling(keys=32, warps=4, stages=1, programs=264)
    if dim > 128:
        return _decode.Tiling(keys=64 if batch == 1 else 32, warps=4, stages=2, programs=264)
    if batch == 1:
        return _decode.Tiling(keys=128, warps=4, stages=2, programs=264)
    if batch <= 8:
        return _decode.Tiling(keys=32, warps=2, stages=4, programs=264)
    return _decode.Tiling(keys=64, warps=4, stages=2, programs=264)


def append_tiling(batch: int, dim: int, dtype: torch.dtype) -> _decode.Tiling:
    if dtype is torch.float32:
        return _decode.Tiling(keys=32, warps=4, stages=1, programs=264, early=_decode.BEFORE)
    if dim > 128:
        return _decode.Tiling(keys=32, warps=4, stages=3, programs=264, early=_decode.EACH)
    if batch == 1:
        return _decode.Tiling(keys=64, warps=4, stages=2, programs=264, early=_decode.EACH)
    if batch <= 8:
        return _decode.Tiling(keys=32, warps=2, stages=4, programs=396, early=_decode.AFTER)
    return _decode.Tiling(keys=64, warps=4, stages=2, programs=396, early=_decode.BEFORE)


def prefill_tiling(
    longest: int, share: int, dim: int, dtype: torch.dtype, room: int
) -> _prefill.Tiling:
    """`room`: bytes of shared memory."""
    packed = share > 1 and longest <= _SHORT
    if dtype is torch.float32:
        return _prefill.Tiling(rows=32, keys=32, warps=4, stages=1, packed=packed)
    if packed or longest <= _LONG:
        return _prefill.Tiling(
            rows=64, keys=64 if dim <= 128 else 32, warps=4, stages=2, packed=packed
        )
    if 64 < dim <= 128 and room >= 227 << 10:
        return _prefill.Tiling(rows=128, keys=128, warps=8, stages=3, packed=False)
    return _prefill.Tiling(rows=128, keys=64, warps=8, stages=3 if dim <= 128 else 2, packed=False)
