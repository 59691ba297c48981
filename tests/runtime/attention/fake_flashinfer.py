"""The package flashinfer as far as kvrun calls it, on CPU: plans are kept, runs are torch's."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch


class Wrapper:
    """Attention of one sequence, whose queries are the last of its keys."""

    made: ClassVar[list["Wrapper"]] = []

    def __init__(self, workspace: torch.Tensor, layout: str, backend: str) -> None:
        assert (layout, backend) == ("NHD", "fa3")
        self.plans: list[tuple[int, int]] = []
        self.runs = 0
        self.made.append(self)

    def plan(self, queries: torch.Tensor, keys: torch.Tensor, *shape: int, **options: Any) -> None:
        self.plans.append((int(queries[1]), int(keys[1])))
        self.shape, self.options = shape, options

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, out: torch.Tensor, **_: Any
    ) -> None:
        self.runs += 1
        assert (len(q), len(k)) == self.plans[-1], "a plan is for one step only"
        heads, kv_heads, dim = self.shape
        assert q.shape[1:] == (heads, dim)
        assert k.shape[1:] == v.shape[1:] == (kv_heads, dim)
        k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * self.options["sm_scale"]
        if cap := self.options["logits_soft_cap"]:
            scores = torch.tanh(scores / cap) * cap
        places = torch.arange(len(k))
        behind = places[-len(q) :, None] - places
        hidden = behind < 0
        if (left := self.options["window_left"]) >= 0:
            hidden |= behind > left
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out.copy_(torch.einsum("hqk,khd->qhd", weights, v))


def install(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[list[Any]]:
    """Put it in the place of the package; what is to be compiled appears in `folder`, and in the
    list that is returned."""
    Wrapper.made.clear()
    asked: list[list[Any]] = []

    def spec(*what: Any) -> SimpleNamespace:
        def build(verbose: bool) -> None:
            asked.append(list(what))
            _, dtype, _, _, _, size, _, _, window, softcap, _ = what
            kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
            uri = (
                f"batch_prefill_with_kv_cache_dtype_q_{kind}_dtype_kv_{kind}_dtype_o_{kind}_"
                f"dtype_idx_i32_head_dim_qk_{size}_head_dim_vo_{size}_posenc_0_use_swa_{window}_"
                f"use_logits_cap_{softcap}_f16qk_False_sm90"
            )
            path = folder / ".cache/flashinfer/0.6.13/90a/cached_ops" / uri / f"{uri}.so"
            path.parent.mkdir(parents=True)
            path.touch()

        return SimpleNamespace(build=build)

    package, jit = ModuleType("flashinfer"), ModuleType("flashinfer.jit")
    env, attention = ModuleType("flashinfer.jit.env"), ModuleType("flashinfer.jit.attention")
    package.BatchPrefillWithRaggedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    package.__version__ = "0.6.13"  # type: ignore[attr-defined]
    env.FLASHINFER_JIT_DIR = folder  # type: ignore[attr-defined]
    jit.env = env  # type: ignore[attr-defined]
    attention.gen_batch_prefill_module = spec  # type: ignore[attr-defined]
    for module in (package, jit, env, attention):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    # The backend's file is read again with the true package, or without one.
    monkeypatch.delitem(sys.modules, "kvrun.runtime.attention.flashinfer", raising=False)
    return asked


def uninstall() -> None:
    """Forget the backend that was made with it."""
    sys.modules.pop("kvrun.runtime.attention.flashinfer", None)
