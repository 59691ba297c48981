"""Paged attention: the twin against attention written out, the Triton form against the twin."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvrun.runtime.kernels import paged_attention as twin
from kvrun.runtime.kernels.rotary import Rotation
from kvrun.runtime.kernels.triton import _decode, _prefill
from kvrun.runtime.kernels.triton import paged_attention as fast

BF16, F32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
TOLERANCE = {F32: 2e-6, BF16: 8e-3}
SMALL = _decode.Tiling(keys=16, warps=4, stages=1, programs=12)


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    """A GPU if there is one: there the same kernels are compiled."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        yield


@dataclass
class Step:
    """Sequences as (tokens known before, queries), and the layer that attends."""

    sequences: list[tuple[int, int]]
    heads: tuple[int, int, int] = (4, 2, 16)
    page: int = 16
    dtype: torch.dtype = F32
    fp8: bool = False
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    idle: int = 0  # sequences of length 0
    padding: int = 0  # rows of q behind the last sequence
    seed: int = 0

    def options(self) -> twin.Options:
        heads, kv_heads, dim = self.heads
        return twin.Options(
            self.page,
            kv_heads,
            dim,
            0.3,
            window=self.window,
            chunk=self.chunk,
            softcap=self.softcap,
            alibi=torch.linspace(0.05, 0.3, heads) if self.alibi else None,
            sinks=torch.linspace(-1.0, 2.0, heads) if self.sinks else None,
        )


@dataclass
class Data:
    """A step's tensors. What nothing may read is NaN."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor

    def decode(self, module: ModuleType, step: Step) -> torch.Tensor:
        arguments = (self.q, self.cache, self.tables, self.lengths, step.options())
        found: torch.Tensor = module.decode(*arguments)
        return found

    def prefill(self, module: ModuleType, step: Step, fresh: bool = False) -> torch.Tensor:
        longest = max(new for _, new in step.sequences)
        found: torch.Tensor = module.prefill(
            self.q, self.k, self.v, self.cache, self.tables, self.starts, self.lengths,
            step.options(), max_query_len=longest, fresh=fresh,
        )  # fmt: skip
        return found


def make(step: Step) -> Data:
    torch.manual_seed(step.seed)
    heads, kv_heads, dim = step.heads
    news = [new for _, new in step.sequences] + [0] * step.idle
    lengths = [known + new for known, new in step.sequences] + [0] * step.idle
    pages = [-(-length // step.page) for length in lengths]
    blocks = list(range(1, 1 + sum(pages)))
    random.Random(step.seed).shuffle(blocks)
    cache = torch.full((1 + sum(pages), step.page, 2, kv_heads, dim), float("nan"))
    cache = cache.to(step.dtype).view(-1, 2, kv_heads, dim)
    tables = torch.zeros(len(lengths), max(*pages, 1) + 2, dtype=torch.int32)
    tokens = sum(news) + step.padding
    buffer = torch.randn(tokens, heads + 2 * kv_heads, dim).to(step.dtype)
    buffer[sum(news) :] = float("nan")
    q, k, v = buffer.split([heads, kv_heads, kv_heads], 1)
    row = 0
    for i, (length, new) in enumerate(zip(lengths, news, strict=True)):
        mine = torch.tensor([blocks.pop() for _ in range(pages[i])], dtype=torch.int32)
        tables[i, : pages[i]] = mine
        slots = (mine.long()[:, None] * step.page + torch.arange(step.page)).view(-1)[:length]
        cache[slots] = torch.randn(length, 2, kv_heads, dim).to(step.dtype)
        cache[slots[length - new :]] = torch.stack((k[row : row + new], v[row : row + new]), 1)
        row += new
    cache = cache.view(len(cache), -1)
    starts = torch.tensor([0, *itertools.accumulate(news)], dtype=torch.int32)
    return Data(
        q, k, v, cache.to(FP8) if step.fp8 else cache, tables, starts,
        torch.tensor(lengths, dtype=torch.int32),
    )  # fmt: skip


def dense(step: Step, data: Data) -> torch.Tensor:
    """Attention of one query and head at a time, in float64."""
    heads, kv_heads, dim = step.heads
    options, cache = step.options(), data.cache.double().view(-1, 2, kv_heads, dim)
    out = torch.zeros(len(data.q), heads, dim, dtype=torch.float64)
    for i, (known, new) in enumerate(step.sequences):
        for query, head in itertools.product(range(new), range(heads)):
            position, row = known + query, int(data.starts[i]) + query
            kv = head // (heads // kv_heads)
            scores, values = [], []
            for key in range(position + 1):
                if step.window is not None and position - key >= step.window:
                    continue
                if step.chunk is not None and position // step.chunk != key // step.chunk:
                    continue
                slot = int(data.tables[i, key // step.page]) * step.page + key % step.page
                score = (data.q[row, head].double() @ cache[slot, 0, kv]) * options.scale
                if step.softcap is not None:
                    score = step.softcap * torch.tanh(score / step.softcap)
                if options.alibi is not None:
                    score = score + options.alibi[head].double() * (key - position)
                scores.append(score)
                values.append(cache[slot, 1, kv])
            if options.sinks is not None:
                scores.append(options.sinks[head].double())
                values.append(torch.zeros(dim, dtype=torch.float64))
            out[row, head] = torch.stack(scores).softmax(0) @ torch.stack(values)
    return out.flatten(1)


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of a result without NaN, relative to the size of what was wanted."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return difference(found, wanted) <= TOLERANCE[found.dtype]


EVERY = {"window": 21, "chunk": 13, "softcap": 0.8, "alibi": True, "sinks": True}
OPTIONS = [{}, *({name: value} for name, value in EVERY.items()), {**EVERY, "chunk": 26}]


def named(options: dict[str, Any]) -> str:
    return "+".join(options) or "plain"


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_twin_is_attention(options: dict[str, Any], fp8: bool) -> None:
    step = Step([(0, 1), (30, 1), (15, 1)], idle=1, padding=1, fp8=fp8, **options)
    data = make(step)
    assert agree(data.decode(twin, step), dense(step, data))
    step = Step([(0, 5), (30, 3), (0, 0), (16, 1)], padding=2, fp8=fp8, page=8, **options)
    data = make(step)
    assert agree(data.prefill(twin, step), dense(step, data))


@pytest.mark.parametrize("module", [twin, fast], ids=["twin", "triton"])
@pytest.mark.parametrize("option", EVERY)
def test_options_matter(module: ModuleType, option: str) -> None:
    """The comparisons here would notice if an option were left out."""
    step = Step([(30, 1), (24, 1)])
    data = make(step)
    other = replace(step, **{option: EVERY[option]})
    assert difference(data.decode(module, other), data.decode(module, step)) > 1e-2
    assert difference(data.prefill(module, other), data.prefill(module, step)) > 1e-2


RAGGED = [(0, 1), (15, 1), (16, 1), (70, 1), (31, 1)]


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_decode(options: dict[str, Any]) -> None:
    step = Step(RAGGED, idle=2, padding=2, **options)
    data = make(step)
    assert agree(data.decode(fast, step), data.decode(twin, step))


@pytest.mark.parametrize("heads", [(7, 1, 64), (3, 3, 80), (16, 1, 16), (2, 1, 128), (4, 2, 256)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_heads(heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    step = Step([(40, 1), (3, 1)], heads, dtype=dtype)
    data = make(step)
    assert agree(data.decode(fast, step), data.decode(twin, step))
    step = Step([(9, 4), (0, 2)], heads, dtype=dtype)
    data = make(step)
    assert agree(data.prefill(fast, step), data.prefill(twin, step))


@pytest.mark.parametrize("page", [16, 32, 64])
@pytest.mark.parametrize("fp8", [False, True])
def test_pages(page: int, fp8: bool) -> None:
    step = Step([(page - 1, 1), (page, 1), (70, 1)], page=page, dtype=BF16, fp8=fp8)
    data = make(step)
    assert agree(data.decode(fast, step), data.decode(twin, step))
    step = Step([(page - 1, 2), (0, page), (70, 1)], page=page, dtype=BF16, fp8=fp8)
    data = make(step)
    assert agree(data.prefill(fast, step), data.prefill(twin, step))


def decoded(step: Step, data: Data, tiling: _decode.Tiling) -> torch.Tensor:
    out = torch.full((len(data.q), data.q[0].numel()), float("nan"), dtype=data.q.dtype)
    options = step.options()
    _decode.launch(data.q, data.cache, data.tables, data.lengths, options, out, tiling)
    return out


@pytest.mark.parametrize("programs", [1, 8, 40])
def test_parts(programs: int) -> None:
    """However many parts a sequence is cut into, alone or beside others."""
    # 20 parts are more than are joined at once; with slopes the late ones weigh most.
    options: dict[str, Any] = {1: {}, 8: EVERY, 40: {"alibi": True}}[programs]
    tiling = SMALL._replace(programs=programs)
    for sequences in ([(319 if programs == 40 else 99, 1)], [(99, 1), (2, 1), (31, 1)]):
        step = Step(sequences, **options)
        data = make(step)
        wanted = data.decode(twin, step)
        first = decoded(step, data, tiling)
        assert agree(first, wanted)
        # Arrivals are counted from zero again, and the order of sums is fixed.
        assert torch.equal(decoded(step, data, tiling), first)


def test_one_long_sequence_is_cut_and_short_ones_are_not() -> None:
    """Parts are even shares of all keys: the grid need not grow with the longest sequence."""
    lengths = [320, 1, 5, 16, 0]
    step = Step([(length - 1, 1) for length in lengths[:-1]], idle=1, padding=1)
    data = make(step)
    written: list[torch.Tensor] = []
    tiling = SMALL._replace(programs=16)

    def empty(count: int, **kwargs: Any) -> torch.Tensor:
        written.append(torch.full((count,), float("nan"), **kwargs))
        return written[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        out = decoded(step, data, tiling)
    assert agree(out, data.decode(twin, step))
    items, heads, dim = len(lengths) + tiling.programs // 2, 4, 16
    sums = written[0][items * heads * dim :].view(items, heads)
    # 342 tokens in 8 shares are 43 each, 48 in whole tiles: seven parts of 320.
    assert (~sums.isnan()).all(1).tolist() == [True] * 7 + [False] * (items - 7)


def test_more_sequences_than_a_scan_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which part is whose is one scan over all lengths, made wider where it must be."""
    monkeypatch.setattr(_decode, "_SCAN", 4)
    step = Step([(i % 3 * 20, 1) for i in range(7)])
    data = make(step)
    assert agree(decoded(step, data, SMALL), data.decode(twin, step))


@pytest.mark.parametrize("module", [twin, fast], ids=["twin", "triton"])
def test_rows_that_pad_a_captured_batch(module: ModuleType) -> None:
    """They have length 0, or 1 and a table of zeros: something finite, and nobody else's."""
    step = Step(RAGGED, sinks=True)
    data = make(step)
    alone = data.decode(module, step)
    data.cache[: step.page] = 1.0
    data.q = torch.cat((data.q, torch.ones(2, 4, 16)))
    data.tables = torch.cat((data.tables, torch.zeros(2, data.tables.shape[1], dtype=torch.int32)))
    data.lengths = torch.cat((data.lengths, torch.tensor([1, 0], dtype=torch.int32)))
    padded = data.decode(module, step)
    assert torch.allclose(padded[:-2], alone, atol=1e-6)
    assert padded.isfinite().all()
    assert not padded[-1].any()


@dataclass
class New:
    """Heads that are neither rotated nor stored yet, for every row of a decode's `Data`."""

    step: Step
    data: Data
    part: float = 1.0  # of a head that turns
    interleaved: bool = False
    normed: bool = False

    def __post_init__(self) -> None:
        (heads, kv_heads, dim), data, rows = self.step.heads, self.data, len(self.data.lengths)
        self.qkv = torch.randn(rows, heads + 2 * kv_heads, dim).to(self.step.dtype)
        half = int(dim * self.part) // 2
        angles = torch.rand(rows, half) * 6
        norms = (torch.rand(2, dim) + 0.5) if self.normed else [None, None]
        self.rotation = Rotation(angles.cos(), angles.sin(), self.interleaved, *norms, 1e-6)
        last = (data.lengths - 1).clamp(min=0).long()
        page = data.tables.long().gather(1, (last // self.step.page)[:, None])[:, 0]
        slots = page * self.step.page + last % self.step.page
        self.slots = torch.where(data.lengths > 0, slots, -1)
        data.cache[self.slots[self.slots >= 0]] = float("nan")  # to be written, never read

    def attend(self, tiling: _decode.Tiling | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers, and the cache that is left behind; without a tiling, those of the twin."""
        data, options, cache = self.data, self.step.options(), self.data.cache.clone()
        lengths, qkv = data.lengths, self.qkv.clone()
        known = (cache, data.tables, lengths, options)
        if tiling is None:
            return twin.append_and_decode(qkv, self.rotation, self.slots, *known), cache
        q = qkv[:, : self.step.heads[0]]
        out = torch.full((len(q), q[0].numel()), float("nan"), dtype=q.dtype)
        newest = _decode.Newest(self.rotation, self.slots)
        _decode.launch(q, *known, out, tiling, newest)
        assert torch.equal(qkv, self.qkv)
        return out, cache

    def agrees(self, tiling: _decode.Tiling) -> bool:
        (found, cache), (wanted, kept) = self.attend(tiling), self.attend(None)
        new = self.slots[self.slots >= 0]
        others = torch.ones(len(cache), dtype=torch.bool)
        others[new] = False
        raw = [rows[others].view(torch.uint8) for rows in (cache, kept)]
        return (
            agree(found, wanted)
            and difference(cache[new].float(), kept[new].float()) <= STORED[cache.dtype]
            and torch.equal(*raw)
        )


STORED = {F32: 1e-6, BF16: 8e-3, FP8: 0.0}
EARLY = [_decode.BEFORE, _decode.AFTER, _decode.EACH]


@pytest.mark.parametrize("options", OPTIONS, ids=named)
@pytest.mark.parametrize("early", EARLY)
def test_the_newest_token(early: str, options: dict[str, Any]) -> None:
    """Rotated, stored and attended to by the kernel that attends to the others."""
    step = Step(RAGGED, idle=2, **options)
    assert New(step, make(step)).agrees(SMALL._replace(early=early))


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("normed", [True, False])
def test_what_becomes_of_the_newest_token(
    normed: bool, part: float, interleaved: bool, dtype: torch.dtype
) -> None:
    step = Step(RAGGED, (6, 2, 24), dtype=dtype)
    assert New(step, make(step), part, interleaved, normed).agrees(SMALL)


def test_the_newest_token_in_fp8() -> None:
    """Values that fp8 holds exactly and nothing turns: Triton's interpreter rounds others wrongly.
    What does not fit saturates."""
    step = Step(RAGGED, (4, 1, 16), dtype=BF16, fp8=True)
    new = New(step, make(step))
    new.qkv = new.qkv.to(FP8).to(BF16)
    new.qkv[:, -1, :3] = torch.tensor([449.0, -3e4, 448.0]).to(BF16)
    new.rotation.cos.fill_(1.0)
    new.rotation.sin.fill_(0.0)
    assert new.agrees(SMALL)
    rows = new.attend(SMALL)[1][new.slots].float()
    assert torch.equal(rows[:, 16:], new.qkv[:, -1].float().clamp(-448, 448))


@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("programs", [1, 8, 40])
def test_parts_with_the_newest_token(programs: int, early: str) -> None:
    """The last part has it; where it would begin another, nothing does."""
    tiling = SMALL._replace(programs=programs, early=early)
    for sequences in ([(320, 1)], [(319, 1)], [(64, 1), (0, 1), (31, 1)]):
        step = Step(sequences, sinks=True)
        new = New(step, make(step))
        assert new.agrees(tiling)
    assert torch.equal(new.attend(tiling)[0], new.attend(tiling)[0])


def test_a_newest_token_without_a_slot() -> None:
    """Stored nowhere, it is attended to all the same."""
    step = Step(RAGGED)
    new = New(step, make(step))
    whole = new.attend(SMALL)[0]
    new.slots[1] = -1
    found, cache = new.attend(SMALL)
    assert torch.equal(found, whole)
    assert cache[int(new.data.tables[1, 0]) * 16 + 15].isnan().all()


def test_the_kernels_own_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    launch = _decode.launch

    def watched(*given: Any) -> None:
        seen.append(given[6].early)
        launch(*given)

    monkeypatch.setattr(_decode, "launch", watched)
    for count, dim in ((1, 16), (3, 16), (9, 16), (1, 256)):
        step = Step([(17 + i, 1) for i in range(count)], (4, 2, dim), dtype=BF16)
        new = New(step, make(step))
        known = (new.data.cache.clone(), new.data.tables, new.data.lengths, step.options())
        found = fast.append_and_decode(new.qkv.clone(), new.rotation, new.slots, *known)
        assert agree(found, new.attend(None)[0])
    assert seen == [_decode.EACH, _decode.AFTER, _decode.BEFORE, _decode.EACH]


def test_which_steps_are_one_kernels() -> None:
    def most(dim: int, dtype: torch.dtype = BF16) -> int:
        qkv = torch.empty(17, 4, dim, dtype=dtype, device="meta")
        return max((n for n in (1, 2, 16, 17) if fast.appends(qkv[:n])), default=0)

    assert (most(128), most(256), most(512)) == (16, 1, 0)
    assert (most(128, F32), most(256, F32)) == (16, 0)


MIXED = [(20, 1), (0, 33), (0, 0), (17, 16), (0, 1), (40, 5)]


@pytest.mark.parametrize("options", OPTIONS, ids=named)
def test_prefill(options: dict[str, Any]) -> None:
    step = Step(MIXED, idle=2, padding=3, dtype=BF16, **options)
    data = make(step)
    found = data.prefill(fast, step)
    assert agree(found, data.prefill(twin, step))
    assert not found[-3:].any()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("options", [{}, EVERY], ids=named)
def test_tiles(options: dict[str, Any], fresh: bool, packed: bool) -> None:
    """Sequences that end inside a tile, at its end, and one row behind it.

    The last one's window of 21 begins one key behind a tile of 16 keys.
    """
    step = Step([(0, 1), (0, 16), (0, 17), (0, 38)], (3, 1, 16), padding=2, **options)
    if not fresh:
        step.sequences = [(7, 1), (16, 16), (0, 17), (31, 39)]
    data = make(step)
    wanted = data.prefill(twin, step, fresh)
    for rows, keys in ((32, 16), (16, 32)):
        out = torch.full_like(wanted, float("nan"))
        tiling = _prefill.Tiling(rows, keys, 4, 1, packed)
        _prefill.launch(
            data.q, data.k, data.v, data.cache, data.tables, data.starts, data.lengths,
            step.options(), fresh, out, tiling,
        )  # fmt: skip
        assert agree(out, wanted)


@pytest.mark.parametrize("module", [twin, fast], ids=["twin", "triton"])
def test_fresh_is_the_same_without_the_cache(module: ModuleType) -> None:
    step = Step([(0, 20), (0, 1), (0, 9)], idle=1, padding=1, dtype=BF16)
    data = make(step)
    paged = data.prefill(module, step)
    data.cache.fill_(float("nan"))
    assert agree(data.prefill(module, step, fresh=True), paged)


@pytest.mark.parametrize("module", [twin, fast], ids=["twin", "triton"])
@pytest.mark.parametrize("heads", [(4, 2, 16), (2, 2, 24)])
def test_without_causality_every_query_sees_all_keys(
    module: ModuleType, heads: tuple[int, int, int]
) -> None:
    step = Step([(5, 7), (3, 1), (0, 40)], heads=heads, padding=2)
    data = make(step)
    data.lengths[2] = 19  # fewer keys than queries
    found = module.prefill(
        data.q, data.k, data.v, data.cache, data.tables, data.starts, data.lengths,
        replace(step.options(), causal=False), max_query_len=40, fresh=False,
    )  # fmt: skip
    of_row = torch.tensor([0] * 7 + [1] + [2] * 40)
    # As the last token of its sequence, each does.
    alone = twin.decode(
        data.q[:48], data.cache, data.tables[of_row], data.lengths[of_row], step.options()
    )
    assert agree(found[:48], alone)
    assert not found[48:].any()


@pytest.mark.parametrize("module", [twin, fast], ids=["twin", "triton"])
def test_out_is_written_where_it_lies(module: ModuleType) -> None:
    step = Step(RAGGED)
    data = make(step)
    wide = torch.full((5, 100), 7.0)
    out = wide[:, 20:84]
    arguments = (data.q, data.cache, data.tables, data.lengths, step.options())
    assert module.decode(*arguments, out=out) is out
    assert agree(out, dense(step, data))
    assert (wide[:, :20] == 7).all()
    assert (wide[:, 84:] == 7).all()


@settings(max_examples=15, deadline=None)
@given(
    sequences=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=4),
    heads=st.sampled_from([(4, 2, 16), (3, 1, 24), (2, 2, 16)]),
    window=st.none() | st.integers(1, 40),
    chunk=st.none() | st.integers(1, 40),
    softcap=st.none() | st.just(1.1),
    alibi=st.booleans(),
    sinks=st.booleans(),
    fp8=st.booleans(),
    single=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_step(
    sequences: list[tuple[int, int]],
    heads: tuple[int, int, int],
    single: bool,
    **kwargs: Any,
) -> None:
    step = Step([(known, 1 if single else new) for known, new in sequences], heads, **kwargs)
    if not single:
        step.sequences.append((3, 2))
    data = make(step)
    if single:
        assert agree(decoded(step, data, SMALL), data.decode(twin, step))
    assert agree(data.prefill(fast, step), data.prefill(twin, step))
