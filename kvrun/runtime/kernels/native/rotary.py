"""Norm, rotation and K/V store on CPU by one call, in C; twin: kernels/rotary.py."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from kvrun.runtime.kernels import rotary as twin
from kvrun.runtime.kernels.native._build import declared
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.rotary import tables as tables

WIDEST = 256  # columns of a head
_ALONE = 1 << 16  # values up to which other threads are not worth waiting for


class _Shape(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "kv_heads", "dim", "width")),
        *((name, ctypes.c_int) for name in ("interleaved", "wide")),
        ("eps", ctypes.c_float),
    )


def available() -> bool:
    return _library() is not None


@cache
def _library() -> Any:
    at, long = ctypes.c_void_p, ctypes.c_int64
    rotate = [None, at, at, long, at, long, *[at] * 5, long, ctypes.c_int]
    return declared(Path(__file__).with_suffix(".c"), kvrun_rotate=rotate)


@cache
def _shape(*fields: Any) -> _Shape:
    return _Shape(*fields)


def rotate_append(
    qkv: torch.Tensor,
    rotation: Rotation,
    cache_rows: torch.Tensor,
    slot_mapping: torch.Tensor,
    kv_heads: int,
    head_dim: int,
) -> None:
    """As the twin, which does it for other dtypes than fp32 and bfloat16, and wider heads."""
    tokens, wide = qkv.shape[0], qkv.dtype is torch.float32
    known = (wide or qkv.dtype is torch.bfloat16) and head_dim <= WIDEST
    if not known or cache_rows.dtype is not qkv.dtype:
        twin.rotate_append(qkv, rotation, cache_rows, slot_mapping, kv_heads, head_dim)
        return
    cos, sin, interleaved, q_weight, k_weight, eps = rotation
    heads, width = qkv.shape[1] // head_dim - 2 * kv_heads, 2 * rotation.half
    threads = 1 if qkv.numel() <= _ALONE else torch.get_num_threads()
    _library().kvrun_rotate(
        ctypes.addressof(_shape(heads, kv_heads, head_dim, width, interleaved, wide, eps)),
        qkv.data_ptr(),
        qkv.stride(0),
        cache_rows.data_ptr(),
        cache_rows.stride(0),
        slot_mapping.data_ptr(),
        *(None if part is None else part.data_ptr() for part in (cos, sin, q_weight, k_weight)),
        tokens,
        threads,
    )
