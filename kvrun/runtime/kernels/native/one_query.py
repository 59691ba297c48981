"""Attention of one query on CPU, in C; twin: kernels/paged_attention.py."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvrun.runtime.kernels.native._build import declared

WIDEST, SHARE = 256, 64  # columns of a head, heads that share keys
_ALONE = 1 << 16  # values of keys up to which other threads are not worth waiting for


def available() -> bool:
    return _library() is not None


@cache
def _library() -> Any:
    at, long, whole = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    attend = [None, *[at] * 3, *[long] * 4, ctypes.c_float, whole, whole]
    return declared(Path(__file__).with_suffix(".c"), kvrun_attend=attend)


def takes(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    known = dtype in (torch.float32, torch.bfloat16)
    return known and head_dim <= WIDEST and heads // kv_heads <= SHARE


def attend(q: torch.Tensor, rows: torch.Tensor, kv_heads: int, scale: float) -> torch.Tensor:
    """q [1, heads, head_dim] over rows [keys, 2 * kv_heads * head_dim], keys of all heads before
    values, both contiguous and of one dtype that `takes` knows -> [1, heads * head_dim]."""
    _, heads, dim = q.shape
    out = torch.empty((1, heads * dim), dtype=q.dtype)
    count = rows.shape[0]
    few = count * kv_heads * dim <= _ALONE
    threads = 1 if few else torch.get_num_threads()
    places = q.data_ptr(), rows.data_ptr(), out.data_ptr()
    wide = q.dtype is torch.float32
    _library().kvrun_attend(*places, count, heads, kv_heads, dim, scale, wide, threads)
    return out
