"""FlashAttention 3 by FlashInfer for long prompts; everything else by kvrun's own kernels.

What FlashInfer is faster at is a long run of queries over keys that lie in one stretch. A prompt
with nothing cached has just made them; the pages of another one are gathered first, which costs
1 % of the attention. Steps of single tokens and of short prompts are captured into graphs, where
kernels that plan on the host have no place.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flashinfer
import torch
from flashinfer.jit import env as places
from flashinfer.jit.attention import gen_batch_prefill_module

from kvrun.errors import KvrunError, Unsupported
from kvrun.runtime.attention import AttentionSpec
from kvrun.runtime.attention._compiled import DTYPES, HEAD_DIMS, NOT_HOPPER, USUAL, Module, named
from kvrun.runtime.attention.triton import Attention as Own
from kvrun.runtime.attention.triton import Plan
from kvrun.runtime.cache.tensors import KVCache

if TYPE_CHECKING:
    from kvrun.runtime.batch import Batch

# What of a layer's specification its kernels do; any other option is left to others.
KNOWN = frozenset({"layer", "heads", "kv_heads", "head_dim", "scale", "window", "softcap"})
LONG = 1024  # queries of a sequence from which planning on the host pays,
FAR = 4096  # and keys from which these kernels are the faster ones
MOST = 4  # sequences of a step that are planned; the others are left to our own kernels
# Plans that may be on their way to the device: two steps' worth.
RING = 2 * MOST
WORKSPACE = 16 << 20  # bytes; FlashAttention 3 splits no keys and needs little
GATHERED = 128 << 20  # bytes of keys and values of one layer


class Long(NamedTuple):
    """A sequence whose queries FlashInfer attends; rows are those of the batch."""

    rows: slice
    queries: int
    context: int
    blocks: torch.Tensor | None  # of its keys and values; None: this step has made them all


class Run(NamedTuple):
    """Neighbouring sequences that are left to our own kernel."""

    rows: slice
    sequences: slice
    starts: torch.Tensor  # cu_seqlens from 0
    longest: int
    fresh: bool


class Kind(NamedTuple):
    """What a plan depends on beside the lengths."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    softcap: float | None


@dataclass
class Step:
    """How one batch is shared out, and the plans of its long sequences by kind of layer."""

    longs: list[Long]
    runs: list[Run]
    plans: dict[Kind, list[Any]] = field(default_factory=dict)


class Attention(Own):
    """As the Triton backend, but for sequences of `LONG` queries and `FAR` keys in
    steps that are launched."""

    def __init__(self, cache: KVCache, dtype: torch.dtype) -> None:
        super().__init__(cache, dtype)
        # Where the package looks for modules that are loaded without asking the compiler.
        places.FLASHINFER_AOT_DIR = places.FLASHINFER_JIT_DIR
        self._dtype = dtype
        device = cache.device
        self._workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
        self._gathered = torch.empty(GATHERED // dtype.itemsize, dtype=dtype, device=device)
        self._rings: dict[Kind, _Ring] = {}

    @staticmethod
    def reject(spec: AttentionSpec, device: torch.device) -> str | None:
        if device.type != "cuda":
            return "its kernels need a CUDA device"
        if torch.cuda.get_device_capability(device)[0] != 9:
            return NOT_HOPPER
        if spec.head_dim not in HEAD_DIMS:
            sizes = ", ".join(map(str, HEAD_DIMS))
            return f"a head of {spec.head_dim} dimensions is not one of {sizes}"
        for option in fields(spec):
            if option.name not in KNOWN and getattr(spec, option.name) is not option.default:
                return f"its kernels know no {option.name}"
        return Own.reject(spec, device)  # which has the other sequences

    def plan(self, batch: "Batch") -> None:
        super().plan(batch)
        if batch.context_lens_host and (step := self._share(batch)).longs:
            batch.shared[self] = step

    def attend(
        self,
        spec: AttentionSpec,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: "Batch",
    ) -> torch.Tensor:
        step: Step | None = batch.shared.get(self)
        if step is None or not spec.causal:
            return super().attend(spec, q, k, v, batch)
        plan: Plan = batch.plan
        cache, options = self.cache.rows(spec.layer), self._options_of(spec)
        tables, lengths, ones = plan.block_tables, plan.context_lens, plan.decodes
        out = q.new_empty((len(q), spec.heads * spec.head_dim))
        if ones:
            self._decode(q[:ones], cache, tables[:ones], lengths[:ones], options, out=out[:ones])
        for run in step.runs:
            self._kernel.prefill(
                q[run.rows], k[run.rows], v[run.rows], cache, tables[run.sequences], run.starts,
                lengths[run.sequences], options, max_query_len=run.longest, fresh=run.fresh,
                out=out[run.rows],
            )  # fmt: skip
        for long, planned in zip(step.longs, self._planned(step, spec), strict=True):
            keys, values = self._keys_and_values(spec, long, k, v)
            target = out[long.rows].view(-1, spec.heads, spec.head_dim)
            planned.run(q[long.rows], keys, values, out=target, enable_pdl=False)
        return out

    def _share(self, batch: "Batch") -> Step:
        """Which sequences of a step are long, and the stretches of others between them."""
        queries, contexts = batch.query_lens_host, batch.context_lens_host
        plan: Plan = batch.plan
        fits = GATHERED // self.cache.widest_row
        first = [0, *accumulate(queries)]
        longs: list[Long] = []
        runs: list[Run] = []
        begun = plan.decodes

        def close(end: int) -> None:
            if begun < end:
                starts = plan.cu_seqlens[begun - plan.decodes : end - plan.decodes + 1]
                runs.append(
                    Run(
                        slice(first[begun], first[end]),
                        slice(begun, end),
                        starts - (first[begun] - plan.decodes),
                        max(queries[begun:end]),
                        queries[begun:end] == contexts[begun:end],
                    )
                )

        for i in range(plan.decodes, len(queries)):
            pages = -(-contexts[i] // batch.block_size)
            fresh = queries[i] == contexts[i]
            room = fresh or pages * batch.block_size <= fits
            short = queries[i] < LONG or contexts[i] < FAR
            if short or not room or len(longs) == MOST:
                continue
            close(i)
            begun = i + 1
            blocks = None if fresh else plan.block_tables[i, :pages]
            rows = slice(first[i], first[i + 1])
            longs.append(Long(rows, queries[i], contexts[i], blocks))
        close(len(queries))
        return Step(longs, runs)

    def _planned(self, step: Step, spec: AttentionSpec) -> list[Any]:
        kind = Kind(spec.heads, spec.kv_heads, spec.head_dim, spec.scale, spec.window, spec.softcap)
        if kind not in step.plans:
            if kind not in self._rings:
                self._rings[kind] = _Ring(self._workspace)
            ring = self._rings[kind]
            step.plans[kind] = [ring.plan(kind, long, self._dtype) for long in step.longs]
        return step.plans[kind]

    def _keys_and_values(
        self, spec: AttentionSpec, long: Long, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [context, kv_heads, head_dim] of a sequence, views of one buffer."""
        if long.blocks is None:
            return k[long.rows], v[long.rows]
        pages = self.cache.blocks(spec.layer)
        size = len(long.blocks) * pages.shape[1]
        found = self._gathered[:size].view(len(long.blocks), -1)
        torch.index_select(pages, 0, long.blocks, out=found)
        both = found.view(-1, 2 * spec.kv_heads, spec.head_dim)[: long.context]
        return both[:, : spec.kv_heads], both[:, spec.kv_heads :]


class _Ring:
    """Wrappers in turn: a plan is written to pinned memory of its wrapper, whose copy to the
    device must have been made before it is written again."""

    def __init__(self, workspace: torch.Tensor) -> None:
        make = flashinfer.BatchPrefillWithRaggedKVCacheWrapper
        self._wrappers = [make(workspace, "NHD", backend="fa3") for _ in range(RING)]
        self._copied: list[torch.cuda.Event | None] = [None] * RING
        self._next = 0

    def plan(self, kind: Kind, long: Long, dtype: torch.dtype) -> Any:
        """A wrapper that is ready to run one sequence."""
        turn, self._next = self._next, (self._next + 1) % RING
        wrapper, copied = self._wrappers[turn], self._copied[turn]
        if copied is not None:
            copied.synchronize()
        wrapper.plan(
            _pinned([0, long.queries]),
            _pinned([0, long.context]),
            kind.heads,
            kind.kv_heads,
            kind.head_dim,
            causal=True,
            # It counts the keys before a query's own.
            window_left=-1 if kind.window is None else kind.window - 1,
            logits_soft_cap=kind.softcap,
            sm_scale=kind.scale,
            q_data_type=dtype,
            kv_data_type=dtype,
        )
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._copied[turn] = event
        return wrapper


def _pinned(values: list[int]) -> torch.Tensor:
    # From pageable memory the copy would wait for the steps that are under way.
    return torch.tensor(values, dtype=torch.int32, pin_memory=True)


# -- kvrun env --compile --------------------------------------------------------------------------


def compile_modules(names: Sequence[str], tell: Callable[[str], None]) -> None:
    """Compile the modules called `names` (none: the usual ones), as far as they are not there.

    `tell` is given a line before and after each. Raises Unsupported where that cannot be done here.
    """
    modules = named(names) if names else list(USUAL)
    _require_compiler()
    for number, module in enumerate(modules, 1):
        head = f"[{number}/{len(modules)}] {module.name}"
        if module.there:
            tell(f"{head}: there already")
            continue
        tell(f"{head}: compiling ...")
        begun = time.monotonic()
        _build(module)
        if not module.there:
            raise KvrunError(
                f"{module.name} was compiled, but not to where it is looked for.",
                cause=f"{flashinfer.__version__} keeps it in {places.FLASHINFER_JIT_DIR}",
                hint="pip install 'kvrun[cuda]' brings the version that is known",
            )
        tell(f"{head}: {time.monotonic() - begun:.0f} s")


def _build(module: Module) -> None:
    dtype = {name: dtype for dtype, name in DTYPES.items()}[module.dtype]
    size = module.head_dim
    spec = gen_batch_prefill_module(
        "fa3", dtype, dtype, dtype, torch.int32, size, size, 0, module.window, module.softcap, False
    )
    try:
        spec.build(verbose=os.environ.get("FLASHINFER_JIT_VERBOSE") == "1")
    except RuntimeError as error:
        words = str(error).strip().splitlines() or ["no reason was given"]
        raise KvrunError(
            f"{module.name} could not be compiled.",
            cause=words[-1],
            hint="FLASHINFER_JIT_VERBOSE=1 shows all that the compiler says",
        ) from error


def _require_compiler() -> None:
    """Raises Unsupported: what is missing to compile for this machine's devices."""
    if not torch.cuda.is_available():
        raise Unsupported(
            "there is nothing to compile for.",
            cause=f"torch {torch.__version__} sees no CUDA device",
            hint="on a CPU kvrun needs no compiled modules",
        )
    if torch.cuda.get_device_capability()[0] != 9:
        raise Unsupported("there is nothing to compile for this device.", cause=NOT_HOPPER)
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    if not (shutil.which("nvcc") or os.access(Path(home, "bin", "nvcc"), os.X_OK)):
        raise Unsupported(
            "CUDA's compiler, nvcc, is not there.",
            cause=f"neither in PATH nor in {home}/bin",
            hint=f"install the CUDA toolkit {torch.version.cuda}, or set CUDA_HOME",
        )
    if not shutil.which("ninja"):
        raise Unsupported("ninja is not there.", hint="pip install ninja")
