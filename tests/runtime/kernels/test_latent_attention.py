"""Attention over a latent cache: the twin against paged attention, the Triton form against it."""

import itertools
import random
from dataclasses import dataclass

import pytest
import torch

from kvrun.runtime.kernels import latent_attention as twin
from kvrun.runtime.kernels import paged_attention
from kvrun.runtime.kernels.triton import latent_attention as fast

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
TOLERANCE = {F32: 2e-6, BF16: 8e-3}
PAGE = 16


@dataclass
class Step:
    """Sequences as (tokens known before, queries) over a cache whose unused rows are NaN."""

    sequences: list[tuple[int, int]]
    heads: int = 5
    latent: int = 32
    rotated: int = 8
    dtype: torch.dtype = F32
    cached: torch.dtype | None = None
    padding: int = 0  # rows of q behind the last sequence

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        width = self.latent + self.rotated
        news = [new for _, new in self.sequences]
        lengths = [known + new for known, new in self.sequences]
        pages = [-(-length // PAGE) for length in lengths]
        blocks = list(range(1, 1 + sum(pages)))
        random.Random(0).shuffle(blocks)
        cache = torch.full(((1 + sum(pages)) * PAGE, width), float("nan"))
        self.tables = torch.zeros(len(lengths), max(*pages, 1) + 2, dtype=torch.int32)
        for i, length in enumerate(lengths):
            mine = torch.tensor([blocks.pop() for _ in range(pages[i])], dtype=torch.int32)
            self.tables[i, : pages[i]] = mine
            slots = (mine.long()[:, None] * PAGE + torch.arange(PAGE)).view(-1)[:length]
            cache[slots] = torch.randn(length, width)
        self.cache = cache.to(self.dtype).to(self.cached or self.dtype)
        wide = torch.randn(sum(news) + self.padding, self.heads, width + 3).to(self.dtype)
        self.q = wide[..., :width]  # a view, as layers give it
        self.starts = torch.tensor([0, *itertools.accumulate(news)], dtype=torch.int32)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.options = twin.Options(PAGE, self.latent, 0.3)
        self.where = (self.cache, self.tables)

    def decode(self, module: object) -> torch.Tensor:
        y: torch.Tensor = module.decode(  # type: ignore[attr-defined]
            self.q, *self.where, self.lengths, self.options
        )
        return y

    def prefill(self, module: object) -> torch.Tensor:
        y: torch.Tensor = module.prefill(  # type: ignore[attr-defined]
            self.q, *self.where, self.starts, self.lengths, self.options
        )
        return y


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    assert found.shape == wanted.shape
    off = (found.double() - wanted.double()).norm() / wanted.double().norm()
    return float(off) <= TOLERANCE[found.dtype]


ONES = [(0, 1), (15, 1), (16, 1), (70, 1)]
RUNS = [(20, 1), (0, 18), (0, 0), (17, 16), (40, 5)]


def test_the_twin_is_attention_with_values_inside_the_keys() -> None:
    step = Step(RUNS, padding=2)
    values = step.cache.clone()
    values[:, step.latent :] = 0
    both = torch.cat((step.cache, values), 1)
    options = paged_attention.Options(PAGE, 1, step.latent + step.rotated, 0.3)
    k = torch.empty(len(step.q), 1, step.latent + step.rotated)
    full = paged_attention.prefill(
        step.q, k, k, both, step.tables, step.starts, step.lengths, options,
        max_query_len=18, fresh=False,
    )  # fmt: skip
    wanted = full.view(len(step.q), step.heads, -1)[..., : step.latent].flatten(1)
    assert agree(step.prefill(twin), wanted)


@pytest.mark.parametrize(("dtype", "cached"), [(F32, None), (BF16, None), (BF16, FP8)])
@pytest.mark.parametrize(("heads", "latent", "rotated"), [(5, 32, 8), (17, 24, 16)])
def test_decode_and_prefill(
    heads: int, latent: int, rotated: int, cached: torch.dtype | None, dtype: torch.dtype
) -> None:
    shape = {"heads": heads, "latent": latent, "rotated": rotated, "dtype": dtype}
    ones = Step(ONES, cached=cached, **shape)  # type: ignore[arg-type]
    assert agree(ones.decode(fast), ones.decode(twin))
    runs = Step(RUNS, padding=3, cached=cached, **shape)  # type: ignore[arg-type]
    found = runs.prefill(fast)
    assert agree(found, runs.prefill(twin))
    assert not found[-3:].any()


def test_the_width_of_deepseek() -> None:
    step = Step([(20, 1), (3, 1)], heads=16, latent=512, rotated=64, dtype=BF16)
    assert agree(step.decode(fast), step.decode(twin))


@pytest.mark.parametrize("parts", [1, 2, 8])
def test_parts_of_a_sequence(parts: int) -> None:
    """However many parts, also more than there are tiles of keys, and with padding rows."""
    step = Step([(69, 1), (2, 1), (0, 0)], padding=1)
    tiling = fast.Tiling(1, 16, warps=4, stages=1, parts=parts)
    arguments = (step.q, *step.where, None, step.lengths, step.options)
    found = fast.launch(*arguments, None, tiling)
    assert agree(found, step.decode(twin))
    assert not found[-1].any()


@pytest.mark.parametrize("queries", [1, 2, 4])
def test_tiles_of_queries(queries: int) -> None:
    step = Step([(7, 1), (16, 16), (0, 17), (31, 39)], padding=2)
    tiling = fast.Tiling(queries, 32, warps=4, stages=1)
    arguments = (step.q, *step.where, step.starts, step.lengths, step.options)
    assert agree(fast.launch(*arguments, None, tiling), step.prefill(twin))
