"""FlashInfer's compiled modules: which one a layer needs, and whether it lies on the disk.

Looking does not import the package, which takes seconds. Paths and names are those of 0.6.13; a
test on a GPU holds them against the package's own.
"""

import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvrun.errors import InvalidRequest

if TYPE_CHECKING:
    from kvrun.runtime.attention import AttentionSpec

PACKAGE = "flashinfer-python"
HEAD_DIMS = (64, 128, 256)
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
COMPILE = "kvrun env --compile"
NOT_HOPPER = "it is used for FlashAttention 3, which needs compute capability 9"


class Module(NamedTuple):
    """One compiled form of FlashAttention 3, with `dtype` named as FlashInfer names it."""

    dtype: str
    head_dim: int
    window: bool = False
    softcap: bool = False

    @classmethod
    def of(cls, spec: "AttentionSpec", dtype: torch.dtype) -> "Module":
        """What a layer needs."""
        windowed, capped = spec.window is not None, spec.softcap is not None
        return cls(DTYPES[dtype], spec.head_dim, windowed, capped)

    @property
    def name(self) -> str:
        """bf16-256-window-softcap"""
        extra = [part for part in ("window", "softcap") if getattr(self, part)]
        return "-".join([self.dtype, str(self.head_dim), *extra])

    @property
    def uri(self) -> str:
        """What FlashInfer calls it and its folder."""
        d, n = self.dtype, self.head_dim
        return (
            f"batch_prefill_with_kv_cache_dtype_q_{d}_dtype_kv_{d}_dtype_o_{d}_dtype_idx_i32_"
            f"head_dim_qk_{n}_head_dim_vo_{n}_posenc_0_use_swa_{self.window}_"
            f"use_logits_cap_{self.softcap}_f16qk_False_sm90"
        )

    @property
    def there(self) -> bool:
        """Whether it has been compiled for the devices of this machine."""
        return (_folder() / self.uri / f"{self.uri}.so").is_file()


# What most models need, those of most models first.
USUAL = (
    Module("bf16", 128), Module("bf16", 64), Module("bf16", 256),
    Module("bf16", 128, window=True), Module("bf16", 64, window=True),
    Module("bf16", 256, window=True), Module("bf16", 256, softcap=True),
    Module("bf16", 256, window=True, softcap=True),
    Module("f16", 128), Module("f16", 64), Module("f16", 256),
)  # fmt: skip


def named(names: Iterable[str]) -> list[Module]:
    """The usual modules by name. Raises InvalidRequest for another one."""
    known = {module.name: module for module in USUAL}
    found = []
    for name in names:
        if name not in known:
            raise InvalidRequest(f"there is no module '{name}'.", hint=f"known: {', '.join(known)}")
        found.append(known[name])
    return found


def missing(
    specs: Iterable["AttentionSpec"], dtype: torch.dtype, kept: torch.dtype, device: torch.device
) -> str | None:
    """Why FlashInfer cannot be used now, apart from what it cannot compute; None when it can.

    `dtype` is that of queries, `kept` that of the cache.
    """
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device)[0] != 9:
        return NOT_HOPPER
    try:
        version(PACKAGE)
    except PackageNotFoundError:
        return "it is not installed (pip install 'kvrun[cuda]')"
    if dtype not in DTYPES:
        return f"it computes in bfloat16 and float16, not in {str(dtype).removeprefix('torch.')}"
    if kept is not dtype:
        return "it does not read a cache of 8 bits"
    needed = {Module.of(spec, dtype) for spec in specs if spec.head_dim in HEAD_DIMS}
    absent = sorted(module.name for module in needed if not module.there)
    return f"{', '.join(absent)} not compiled ({COMPILE})" if absent else None


def _folder() -> Path:
    """Where FlashInfer keeps what it has compiled for the devices that there are."""
    root = Path(os.environ.get("FLASHINFER_WORKSPACE_BASE") or Path.home())
    wanted = os.environ.get("FLASHINFER_CUDA_ARCH_LIST")
    if wanted is not None:
        archs = {(int(a.split(".")[0]), a.split(".")[1]) for a in wanted.split(" ")}
    else:
        capabilities = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        archs = {(major, str(minor)) for major, minor in capabilities}
    # Hopper's own instructions have the suffix "a".
    full = sorted((n, m if m[-1].isalpha() or n < 9 else m + "a") for n, m in archs)
    arch = "_".join(f"{major}{minor}" for major, minor in full)
    return root / ".cache" / "flashinfer" / version(PACKAGE) / arch / "cached_ops"
