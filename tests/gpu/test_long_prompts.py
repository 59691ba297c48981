"""Prompts of thousands of tokens, whose tiles are larger than an interpreter has time for."""

import pytest
import torch

from kvrun.runtime.kernels import paged_attention as twin
from kvrun.runtime.kernels.triton import paged_attention
from kvrun.runtime.kernels.triton._device import shared_memory
from tests.gpu.beside import DEVICE

pytestmark = pytest.mark.gpu

PAGE = 16
# (queries, tokens known before): the first one's decide how all are cut.
LONG = 4500 if DEVICE != "cpu" else 70
SEQUENCES = ((LONG, 0), (40, 300), (17, 0))
FORMS = {"128": (8, 2, 128), "96": (4, 2, 96), "64": (4, 4, 64), "256": (4, 2, 256)}


@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("heads", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_prompt_beyond_small_tiles(
    dtype: torch.dtype, heads: str, fresh: bool, window: int | None
) -> None:
    count, kv_heads, dim = FORMS[heads]
    sequences = [(n, 0 if fresh else before) for n, before in SEQUENCES]
    lengths = [n + before for n, before in sequences]
    pages = [-(-length // PAGE) for length in lengths]
    source = torch.Generator().manual_seed(1)
    order = torch.randperm(sum(pages), generator=source).int()
    tables = torch.zeros(len(pages), max(pages), dtype=torch.int32)
    for row, some in enumerate(order.split(pages)):
        tables[row, : len(some)] = some
    width = 2 * kv_heads * dim
    cache = torch.randn(sum(pages) * PAGE, width, generator=source).to(DEVICE, dtype)
    total = sum(n for n, _ in sequences)
    q = torch.randn(total, count, dim, generator=source).to(DEVICE, dtype)
    ends = torch.tensor([0, *(n for n, _ in sequences)]).cumsum(0).int()
    places = torch.cat(
        [
            tables[row].long()[torch.arange(before, n + before) // PAGE] * PAGE
            + torch.arange(before, n + before) % PAGE
            for row, (n, before) in enumerate(sequences)
        ]
    ).to(DEVICE)
    k, v = cache[places].view(total, 2, kv_heads, dim).unbind(1)
    options = twin.Options(PAGE, kv_heads, dim, dim**-0.5, window=window)
    given = (
        q, k, v, cache, tables.to(DEVICE), ends.to(DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE), options,
    )  # fmt: skip
    got = paged_attention.prefill(*given, max_query_len=LONG, fresh=fresh)
    wanted = twin.prefill(*given, max_query_len=LONG, fresh=fresh)
    off = (got.float() - wanted.float()).norm() / wanted.float().norm()
    assert got.isfinite().all()
    assert float(off) < 8e-3


def test_tiles_of_128_keys_are_what_this_device_uses() -> None:
    """Where it has the room: else the tests above have tried smaller ones."""
    room = shared_memory(torch.device(DEVICE))
    tiling = paged_attention.prefill_tiling(4500, 4, 128, torch.bfloat16, room)
    assert tiling.keys == (128 if room >= 227 << 10 else 64)
