"""The sdpa backend against attention written out densely, one sequence and head at a time."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from kvrun.runtime.attention import AttentionSpec, Backend
from kvrun.runtime.attention._groups import split
from kvrun.runtime.attention.sdpa import Attention
from kvrun.runtime.batch import Batch
from kvrun.runtime.cache.tensors import KVCache, bytes_per_block
from tests.runtime.driver import Part, make_batch

CPU = torch.device("cpu")


def attend(
    backend: Backend,
    spec: AttentionSpec,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Batch,
) -> torch.Tensor:
    """What a layer does: store, then attend."""
    backend.cache.store(spec.layer, batch.slot_mapping, torch.cat((k, v), 1))
    return backend.attend(spec, q, k, v, batch)


@dataclass
class Known:
    """A sequence's keys and values [tokens, kv_heads, head_dim]; some are in the cache already."""

    keys: torch.Tensor
    values: torch.Tensor


def dense(spec: AttentionSpec, q: torch.Tensor, known: Known, start: int) -> torch.Tensor:
    """q [queries, heads, head_dim] at positions start, start + 1, ..., in float64."""
    out = torch.empty(q.shape, dtype=torch.float64)
    for row in range(len(q)):
        position = start + row
        first = 0 if spec.window is None else max(0, position - spec.window + 1)
        if spec.chunk is not None:
            first = max(first, position // spec.chunk * spec.chunk)
        for head in range(spec.heads):
            kv = head // (spec.heads // spec.kv_heads)
            keys = known.keys[first : position + 1, kv].double()
            scores = keys @ q[row, head].double() * spec.scale
            if spec.softcap is not None:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            if spec.alibi is not None:
                distance = torch.arange(first, position + 1) - position
                scores = scores + spec.alibi[head].double() * distance
            if spec.sinks is not None:
                scores = torch.cat([scores, spec.sinks[head].double().view(1)])
            weights = scores.softmax(0)[: len(keys)]
            out[row, head] = weights @ known.values[first : position + 1, kv].double()
    return out.flatten(1)


def run(
    spec: AttentionSpec,
    lengths: list[tuple[int, int]],
    *,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    shared: int = 0,
    seed: int = 0,
    runs: bool = False,
    make: Callable[[KVCache, torch.dtype], Backend] = Attention,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend (cached, new) tokens of several sequences in one step: what came out and what should.

    The cached part is written in a step of its own. The first `shared` tokens are the same, in
    the same blocks, for all. `runs` gives each sequence blocks that follow one another.
    """
    torch.manual_seed(seed)
    blocks = list(range(1, 400))
    if not runs:
        random.Random(seed).shuffle(blocks)
    backend = make(KVCache([spec], 400, block_size, dtype, CPU), dtype)
    head = [blocks.pop(0) for _ in range(shared // block_size)]
    sequences, tables = [], []
    for cached, new in lengths:
        size = (cached + new, spec.kv_heads, spec.head_dim)
        sequence = Known(torch.randn(size).to(dtype), torch.randn(size).to(dtype))
        if sequences:
            sequence.keys[:shared] = sequences[0].keys[:shared]
            sequence.values[:shared] = sequences[0].values[:shared]
        sequences.append(sequence)
        rest = -(-(cached + new) // block_size) - len(head)
        tables.append(head + [blocks.pop(0) for _ in range(rest)])

    def step(ranges: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = [i for i, (first, last) in enumerate(ranges) if last > first]
        parts = [Part([0] * (ranges[i][1] - ranges[i][0]), ranges[i][0], tables[i]) for i in chosen]
        batch = make_batch(parts, block_size, backend)
        k = torch.cat([sequences[i].keys[slice(*ranges[i])] for i in chosen])
        v = torch.cat([sequences[i].values[slice(*ranges[i])] for i in chosen])
        q = torch.randn(len(k), spec.heads, spec.head_dim).to(dtype)
        # As a model gives them: views of one buffer.
        buffer = torch.cat([q, k, v], 1)
        views = buffer.split([spec.heads, spec.kv_heads, spec.kv_heads], 1)
        found = attend(backend, spec, *views, batch)
        wanted, row = [], 0
        for i in chosen:
            count = ranges[i][1] - ranges[i][0]
            wanted.append(dense(spec, q[row : row + count], sequences[i], ranges[i][0]))
            row += count
        return found, torch.cat(wanted)

    if any(cached for cached, _ in lengths):
        step([(0, cached) for cached, _ in lengths])
    return step([(cached, cached + new) for cached, new in lengths])


def close(result: tuple[torch.Tensor, torch.Tensor], tolerance: float = 2e-5) -> bool:
    found, wanted = result
    assert found.shape == wanted.shape
    return bool((found.double() - wanted).abs().max() <= tolerance)


OPTIONS = {
    "plain": {},
    "window": {"window": 5},
    "chunk": {"chunk": 6},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": torch.tensor([0.5, 0.25, 0.125, 0.06])},
    "sinks": {"sinks": torch.tensor([0.3, -1.0, 2.0, 0.0])},
    "all": {
        "window": 7,
        "softcap": 1.5,
        "alibi": torch.tensor([0.5, 0.25, 0.125, 0.06]),
        "sinks": torch.tensor([0.3, -1.0, 2.0, 0.0]),
    },
}
MIXES = {
    "one decode": [(17, 1)],
    "one prefill": [(0, 13)],
    "one chunk": [(9, 5)],
    "equal decodes": [(12, 1)] * 3,
    "ragged decodes": [(3, 1), (30, 1), (11, 1), (0, 1)],
    "equal prefills": [(0, 6)] * 2,
    "equal chunks": [(8, 6)] * 2,
    "far apart decodes": [(3, 1), (700, 1), (5, 1)],
    "equal lengths, other starts": [(0, 12), (3, 9), (2, 10)],
    "everything": [(20, 1), (0, 9), (6, 3), (33, 1), (2, 14), (0, 1), (15, 4)],
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_options_and_mixes(options: str, mix: str, kv_heads: int) -> None:
    spec = AttentionSpec(0, 4, kv_heads, 8, 0.41, **OPTIONS[options])
    assert close(run(spec, MIXES[mix], block_size=8))


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("options", ["plain", "softcap", "alibi"])
def test_bfloat16(options: str, mix: str) -> None:
    spec = AttentionSpec(0, 4, 2, 16, 0.25, **OPTIONS[options])
    assert close(run(spec, MIXES[mix], block_size=8, dtype=torch.bfloat16), 3e-2)


@pytest.mark.parametrize("lengths", [[(21, 1)], [(0, 7)], [(9, 6)], [(40, 1), (8, 3)]])
def test_blocks_that_follow_one_another(lengths: list[tuple[int, int]]) -> None:
    assert close(run(AttentionSpec(0, 4, 2, 8, 0.35), lengths, runs=True))


@pytest.mark.parametrize("option", ["window", "chunk", "softcap", "alibi", "sinks"])
def test_options_matter(option: str) -> None:
    """The comparison above would notice if the backend left an option out."""
    spec = AttentionSpec(0, 4, 2, 8, 0.41, **OPTIONS[option])
    plain = AttentionSpec(0, 4, 2, 8, 0.41)
    with_option, _ = run(spec, MIXES["everything"])
    _, without = run(plain, MIXES["everything"])
    assert (with_option.double() - without).abs().max() > 1e-2


parts = st.tuples(st.integers(0, 40), st.integers(1, 20))
steps = st.lists(st.tuples(st.integers(0, 60), st.just(1)) | parts, min_size=1, max_size=7)


@settings(max_examples=60, deadline=None)
@given(
    lengths=steps,
    shape=st.sampled_from([(4, 4, 8), (4, 2, 16), (6, 1, 8), (6, 3, 5)]),
    block_size=st.sampled_from([1, 4, 16]),
    shared_blocks=st.integers(0, 3),
    window=st.none() | st.integers(1, 30),
    softcap=st.none() | st.just(0.9),
    slopes=st.booleans(),
    sinks=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_step(
    lengths: list[tuple[int, int]],
    shape: tuple[int, int, int],
    block_size: int,
    shared_blocks: int,
    window: int | None,
    softcap: float | None,
    slopes: bool,
    sinks: bool,
    seed: int,
) -> None:
    heads, kv_heads, head_dim = shape
    shared = shared_blocks * block_size
    lengths = [(cached + shared, new) for cached, new in lengths]
    spec = AttentionSpec(
        0,
        heads,
        kv_heads,
        head_dim,
        0.37,
        window=window,
        softcap=softcap,
        alibi=torch.linspace(0.1, 0.6, heads) if slopes else None,
        sinks=torch.linspace(-1.0, 1.0, heads) if sinks else None,
    )
    assert close(run(spec, lengths, block_size=block_size, shared=shared, seed=seed))


def test_layers_share_masks_but_not_caches() -> None:
    specs = [AttentionSpec(i, 4, 2, 8, 0.35, window=w) for i, w in enumerate((None, 3, None))]
    backend = Attention(KVCache(specs, 20, 4, torch.float32, CPU), torch.float32)
    batch = make_batch([Part([0] * 6, 0, [3, 7]), Part([0] * 2, 0, [5])], 4, backend)
    torch.manual_seed(0)
    for spec in specs:
        buffer = torch.randn(8, 8, 8)
        q, k, v = buffer.split([4, 2, 2], 1)
        found = attend(backend, spec, q, k, v, batch)
        first = dense(spec, q[:6], Known(k[:6], v[:6]), 0)
        second = dense(spec, q[6:], Known(k[6:], v[6:]), 0)
        assert close((found, torch.cat([first, second])))


def test_separate_keys_and_values_are_taken_too() -> None:
    spec = AttentionSpec(0, 2, 2, 8, 0.35)
    backend = Attention(KVCache([spec], 8, 4, torch.float32, CPU), torch.float32)
    batch = make_batch([Part([0] * 5, 0, [2, 1])], 4, backend)
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    assert close((attend(backend, spec, q, k, v, batch), dense(spec, q, Known(k, v), 0)))


def test_scores_are_cut_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvrun.runtime.attention.sdpa._SCORES", 64)
    assert close(run(AttentionSpec(0, 4, 2, 8, 0.3, softcap=0.8), MIXES["everything"]))


def test_what_a_failed_request_left_behind_is_cleared() -> None:
    """Slots beyond a sequence's end weigh nothing, but nothing times NaN is NaN."""
    spec = AttentionSpec(0, 2, 2, 8, 0.35)
    backend = Attention(KVCache([spec], 8, 4, torch.float32, CPU), torch.float32)
    spoilt = torch.full((4, 2, 8), float("nan"))
    attend(backend, spec, spoilt, spoilt, spoilt, make_batch([Part([0] * 4, 0, [3])], 4, backend))
    backend.cache.clear([3])
    q, k, v = (torch.randn(6, 2, 8) for _ in range(3))
    batch = make_batch([Part([0] * 2, 0, [3]), Part([0] * 4, 0, [5])], 4, backend)
    found = attend(backend, spec, q, k, v, batch)
    assert close((found[:2], dense(spec, q[:2], Known(k[:2], v[:2]), 0)))


def test_groups_keep_lengths_together() -> None:
    groups = split([1, 1, 9, 1, 12, 1], [10, 5000, 9, 30, 40, 4900])
    assert sorted(i for group in groups for i in group) == [0, 1, 2, 3, 4, 5]
    assert {frozenset(group) for group in groups} == {
        frozenset({2, 4}), frozenset({1, 5}), frozenset({0, 3}),
    }  # fmt: skip


def test_a_batch_of_decodes_is_few_groups() -> None:
    lengths = [random.Random(i).randint(1, 4000) for i in range(256)]
    assert len(split([1] * 256, lengths)) < 40
    assert len(split([1] * 8, [150 + i for i in range(8)])) == 1


def test_bytes_per_block_are_what_the_cache_takes() -> None:
    specs = [AttentionSpec(0, 4, 2, 8, 1.0), AttentionSpec(1, 4, 4, 16, 1.0)]
    cache = KVCache(specs, 10, 4, torch.bfloat16, CPU)
    taken = sum(cache.rows(layer).nbytes for layer in (0, 1))
    assert 10 * bytes_per_block(specs, 4, torch.bfloat16) == taken
