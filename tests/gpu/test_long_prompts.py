"""Prompts of thousands of tokens, which are cut into larger tiles than shorter ones.

KVRUN_TEST_DEVICE=cpu TRITON_INTERPRET=1 tries the same tiles with fewer queries.
"""

from typing import Any

import pytest
import torch

from kvrun.runtime.kernels import paged_attention as twin
from kvrun.runtime.kernels.triton import _prefill, paged_attention
from kvrun.runtime.kernels.triton._device import shared_memory
from tests.gpu.beside import DEVICE

pytestmark = pytest.mark.gpu

PAGE = 16
LONGEST = 4500  # queries, which decide how all are cut
FIRST = LONGEST if DEVICE != "cpu" else 300
SEQUENCES = ((FIRST, 0), (40, 300), (17, 0))  # (queries, tokens known before)
FORMS = {"128": (8, 2, 128), "96": (4, 2, 96), "64": (8, 2, 64), "256": (4, 2, 256)}
# Of a query's answer, by its norm: weights and sums are rounded to the dtype once each.
CLOSE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}


def _tensors(heads: tuple[int, int, int], dtype: torch.dtype, fresh: bool) -> tuple[Any, ...]:
    """q, k, v, cache, block tables, cu_seqlens and lengths; pages lie in no order."""
    count, kv_heads, dim = heads
    sequences = [(n, 0 if fresh else before) for n, before in SEQUENCES]
    lengths = [n + before for n, before in sequences]
    pages = [-(-length // PAGE) for length in lengths]
    source = torch.Generator().manual_seed(1)
    order = torch.randperm(sum(pages), generator=source).int()
    tables = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, some in enumerate(order.split(pages)):
        tables[row, : len(some)] = some
    cache = torch.randn(sum(pages) * PAGE, 2 * kv_heads * dim, generator=source).to(DEVICE, dtype)
    total = sum(n for n, _ in sequences)
    q = torch.randn(total, count, dim, generator=source).to(DEVICE, dtype)
    ends = torch.tensor([0, *(n for n, _ in sequences)]).cumsum(0).int().to(DEVICE)
    places = []
    for row, (n, before) in enumerate(sequences):
        tokens = torch.arange(before, n + before)
        places.append(tables[row].long()[tokens // PAGE] * PAGE + tokens % PAGE)
    rows = cache[torch.cat(places).to(DEVICE)]
    k, v = rows.view(total, 2, kv_heads, dim).unbind(1)
    context = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    return q, k, v, cache, tables.to(DEVICE), ends, context


@pytest.mark.parametrize("window", [None, 1000 if DEVICE != "cpu" else 150])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_a_prompt_beyond_small_tiles(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, form: str, fresh: bool, window: int | None
) -> None:
    cuts: list[_prefill.Tiling] = []
    launch = _prefill.launch

    def watched(*args: Any) -> None:
        cuts.append(args[-1])
        launch(*args)

    monkeypatch.setattr(_prefill, "launch", watched)
    count, kv_heads, dim = FORMS[form]
    given = _tensors(FORMS[form], dtype, fresh)
    options = twin.Options(PAGE, kv_heads, dim, dim**-0.5, window=window)
    got = paged_attention.prefill(*given, options, max_query_len=LONGEST, fresh=fresh)
    exact: list[Any] = [x.float() if x.is_floating_point() else x for x in given]
    wanted = twin.prefill(*exact, options, max_query_len=LONGEST, fresh=fresh)
    if DEVICE != "cpu":
        torch.cuda.empty_cache()  # its scores are gigabytes that tests beside this one may need
    room = shared_memory(torch.device(DEVICE))
    large = 64 < dim <= 128 and room >= 227 << 10
    assert [(cut.rows, cut.keys) for cut in cuts] == [(128, 128 if large else 64)]
    got, wanted = (x.view(-1, count, dim) for x in (got.float(), wanted))
    off = (got - wanted).norm(dim=2) / wanted.norm(dim=2)  # of each query and head
    assert got.isfinite().all()
    assert float(off.max()) < CLOSE[dtype]
