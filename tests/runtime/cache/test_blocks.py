"""BlockPool and PrefixCache: who owns a block, what is evicted first, what is never hit."""

import pytest

from kvrun.runtime.cache.blocks import BlockPool
from kvrun.runtime.cache.prefix import PrefixCache


def filled(tokens: list[int], *, blocks: int = 8) -> tuple[BlockPool, PrefixCache, list[int]]:
    """A pool whose cache holds `tokens` in blocks of two that nobody owns any more."""
    pool = BlockPool(blocks + 1)
    cache = PrefixCache(pool, 2)
    taken = pool.take(len(tokens) // 2)
    key = cache.root(None)
    for index, block in enumerate(taken):
        key = cache.register(key, tokens[2 * index : 2 * index + 2], block)
    pool.release(taken)
    return pool, cache, taken


def test_block_zero_is_never_given_away() -> None:
    pool = BlockPool(5)
    assert sorted(pool.take(4)) == [1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="0 free"):
        pool.take(1)


def test_shared_blocks_are_free_after_their_last_owner() -> None:
    pool = BlockPool(4)
    blocks = pool.take(2)
    pool.share(blocks)
    pool.release(blocks)
    assert pool.free == 1
    pool.release(blocks)
    assert pool.free == 3
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(blocks)


def test_blocks_without_a_prefix_go_first_then_the_tails() -> None:
    pool, cache, taken = filled([1, 2, 3, 4, 5, 6], blocks=5)
    assert pool.kept == 3
    assert set(pool.take(2)).isdisjoint(taken)
    assert pool.take(1) == [taken[2]]
    assert cache.lookup(cache.root(None), [1, 2, 3, 4, 5, 6, 7])[0] == taken[:2]
    assert pool.take(2) == [taken[1], taken[0]]
    assert cache.lookup(cache.root(None), [1, 2, 3])[0] == []


def test_a_hit_in_use_is_evicted_later() -> None:
    pool, _, taken = filled([1, 2, 3, 4], blocks=2)
    pool.share(taken[:1])
    pool.release(taken[:1])
    assert pool.take(1) == [taken[1]]


@pytest.mark.parametrize(
    ("tokens", "hit"),
    [
        ([1, 2, 3, 4, 5], 2),
        ([1, 2, 3, 4], 1),  # the last token has to be computed
        ([1, 2, 9, 4, 5], 1),
        ([9, 2, 3, 4, 5], 0),
        ([3, 4, 1, 2, 5], 0),  # the same block, but behind another past
        ([], 0),
    ],
)
def test_lookup(tokens: list[int], hit: int) -> None:
    _, cache, taken = filled([1, 2, 3, 4])
    assert cache.lookup(cache.root(None), tokens)[0] == taken[:hit]
    assert cache.lookup(cache.root("pirate"), tokens)[0] == []


def test_a_hash_collision_is_no_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PrefixCache, "_key", lambda self, parent, chunk: b"same")
    _, cache, taken = filled([1, 2])
    root = cache.root(None)
    assert cache.lookup(root, [1, 2, 3])[0] == taken
    assert cache.lookup(root, [8, 9, 3])[0] == []


def test_forgotten_blocks_are_not_hit_and_taken_first() -> None:
    pool, cache, taken = filled([1, 2, 3, 4], blocks=2)
    cache.forget(taken[:1])
    assert cache.lookup(cache.root(None), [1, 2, 3])[0] == []
    assert pool.take(1) == taken[:1]
    cache.forget([99])  # unknown: nothing happens


def test_keys_differ_between_processes() -> None:
    pool = BlockPool(2)
    assert PrefixCache(pool, 2).root(None) != PrefixCache(pool, 2).root(None)
