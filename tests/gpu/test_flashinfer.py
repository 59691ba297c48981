"""On a Hopper GPU with FlashInfer: its modules are where kvrun looks, and attend as the twin does.

`kvrun env --compile --only bf16-64,bf16-128,bf16-128-window,bf16-256-softcap,f16-128` comes first;
then `pytest -m gpu tests/gpu/test_flashinfer.py`.
"""

import json
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from kvrun import LLM, SamplingParams
from kvrun.folder import load
from kvrun.runtime.attention import AttentionSpec, _compiled
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.tensors import KVCache
from kvrun.runtime.kernels import paged_attention as twin

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
PAGE = 64
FOLDER = Path(__file__).parents[1] / "golden" / "tiny"
TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 1.5e-3}


@pytest.fixture
def backend() -> ModuleType:
    return load("kvrun.runtime.attention", "flashinfer")


def test_names_and_places_are_the_package_s() -> None:
    import flashinfer
    from flashinfer.jit import env
    from flashinfer.jit.attention.modules import get_batch_prefill_uri

    dtypes = {name: dtype for dtype, name in _compiled.DTYPES.items()}
    for module in _compiled.USUAL:
        dtype, size = dtypes[module.dtype], module.head_dim
        kind = (dtype, dtype, dtype, torch.int32, size, size, 0, module.window, module.softcap)
        assert get_batch_prefill_uri("fa3", *kind, False) == module.uri
    assert _compiled._folder() == env.FLASHINFER_JIT_DIR
    assert flashinfer.__version__ == _compiled.version(_compiled.PACKAGE)


# (cached, new) of each sequence, single tokens first.
STEPS = {
    "one prompt": [(0, 2048)],
    "odd prompt": [(0, 1111)],
    "one chunk": [(1000, 1500)],
    "behind a long prefix": [(6001, 1024)],
    "singles, short ones, prompts and chunks": [
        (700, 1), (33, 1), (0, 100), (0, 1500), (5, 40), (900, 1030), (0, 1025), (64, 64),
    ],
    "more than are planned": [(0, 1024), (10, 1024), (0, 1100), (100, 1024), (0, 1024), (7, 1050)],
    "no long one": [(100, 1), (0, 300), (50, 1023)],
}  # fmt: skip
KINDS: dict[str, tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]] = {
    "llama": ((32, 8, 128), torch.bfloat16, {}),
    "fp16": ((16, 8, 128), torch.float16, {}),
    "small heads": ((4, 2, 64), torch.bfloat16, {}),
    "window": ((16, 8, 128), torch.bfloat16, {"window": 300}),
    "softcap": ((8, 4, 256), torch.bfloat16, {"softcap": 5.0}),
}


@torch.inference_mode()
@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_attends_as_the_twin_does(
    backend: ModuleType,
    kind: tuple[tuple[int, int, int], torch.dtype, dict[str, Any]],
    lengths: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (heads, kv_heads, dim), dtype, options = kind
    generator = torch.Generator(CUDA).manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=CUDA).to(dtype)

    spec = AttentionSpec(0, heads, kv_heads, dim, dim**-0.5, **options)
    assert backend.Attention.reject(spec, CUDA) is None
    assert _compiled.missing([spec], dtype, dtype, CUDA) is None
    pages = [-(-(old + new) // PAGE) for old, new in lengths]
    cache = KVCache([spec], 1 + sum(pages), PAGE, dtype, CUDA)
    cache.rows(0).copy_(random(*cache.rows(0).shape))
    order = (torch.randperm(sum(pages), generator=generator, device=CUDA) + 1).int()
    tables = torch.zeros((len(pages), max(pages)), dtype=torch.int32, device=CUDA)
    for row, (first, count) in enumerate(zip(accumulate([0, *pages]), pages, strict=False)):
        tables[row, :count] = order[first : first + count]
    news, contexts = [new for _, new in lengths], [old + new for old, new in lengths]
    places = torch.cat([torch.arange(old, old + new, device=CUDA) for old, new in lengths])
    owners = torch.repeat_interleave(
        torch.arange(len(news), device=CUDA), torch.tensor(news, device=CUDA)
    )
    slots = tables[owners, places // PAGE].long() * PAGE + places % PAGE
    q, k, v = random(sum(news), heads + 2 * kv_heads, dim).split([heads, kv_heads, kv_heads], 1)
    monkeypatch.setattr(backend, "FAR", 0)
    own = backend.Attention(cache, dtype)
    ends = torch.tensor([0, *accumulate(news)], device=CUDA)
    for repeat in range(3):  # the second and third plan into used buffers
        batch = Batch(
            ids=slots, positions=places, slot_mapping=slots, block_tables=tables,
            cu_seqlens=ends, context_lens=torch.tensor(contexts, device=CUDA),
            last_rows=ends[1:] - 1, query_lens_host=news, context_lens_host=contexts,
            block_size=PAGE, backend=own,
        )  # fmt: skip
        cache.store(0, slots, torch.cat([k, v], 1))
        own.plan(batch)
        found = own.attend(spec, q, k, v, batch).double()
        wanted = twin.prefill(
            q, k, v, cache.rows(0), tables, ends.int(), batch.context_lens.int(),
            twin.Options(PAGE, kv_heads, dim, spec.scale, window=spec.window, softcap=spec.softcap),
            max_query_len=max(news), fresh=False,
        ).double()  # fmt: skip
        assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm(), repeat
    planned = batch.shared.get(own)
    long = [new for new in news if new >= backend.LONG]
    assert [one.queries for one in planned.longs] == long[: backend.MOST] if long else not planned


def answers(records: list[dict[str, Any]], **options: Any) -> list[list[int]]:
    params = [SamplingParams(temperature=0, max_tokens=len(r["output_ids"])) for r in records]
    with LLM("tiny", device="cuda", dtype="bfloat16", kv_memory=256 << 20, **options) as llm:
        assert llm.ready.attention == options["attention"]
        outputs = llm.generate([r["prompt_ids"] for r in records], params)
    assert not [o.error for o in outputs if o.error]
    return [o.token_ids for o in outputs]


@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "captured"])
@pytest.mark.parametrize("budget", [None, 40], ids=["whole", "chunks"])
def test_tiny_answers_alike(
    backend: ModuleType, graphs: bool, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record's best token leads by 0.1 or more; bf16 turns few of them."""
    monkeypatch.setattr(backend, "LONG", 16)
    monkeypatch.setattr(backend, "FAR", 0)
    records = json.loads((FOLDER / "chat.json").read_text())
    options: dict[str, Any] = {"cuda_graphs": graphs, "max_num_batched_tokens": budget}
    options = {name: value for name, value in options.items() if value is not None}
    found = answers(records, attention="flashinfer", **options)
    right = [ids == r["output_ids"] for ids, r in zip(found, records, strict=True)]
    assert sum(right) >= 0.9 * len(right)


def test_auto_takes_it() -> None:
    with LLM("tiny", device="cuda", dtype="bfloat16") as llm:
        assert (llm.ready.attention, llm.ready.attention_note) == ("flashinfer", "")
    with LLM("tiny", device="cuda", dtype="float32") as llm:
        assert llm.ready.attention == "triton"
        assert "float32" in llm.ready.attention_note
