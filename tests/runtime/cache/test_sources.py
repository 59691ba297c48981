"""Prompts that an encoder has read: hit as a whole, gone as a whole."""

from kvrun.runtime.cache.blocks import BlockPool
from kvrun.runtime.cache.sources import SourceCache


def test_a_prompt_is_hit_until_one_of_its_blocks_is_taken() -> None:
    pool = BlockPool(6)
    cache = SourceCache(pool)
    blocks = pool.take(3)
    cache.register("a", (None, 1, 2), blocks)
    pool.release(blocks)
    assert pool.kept == 3
    assert cache.lookup("b", (None, 1, 2)) == blocks
    assert cache.lookup("b", (None, 1)) == []
    assert cache.lookup("b", ("adapter", 1, 2)) == []
    pool.take(3)  # two that were never kept, and one of these
    assert cache.lookup("b", (None, 1, 2)) == []
    assert pool.kept == 0
    assert pool.free == 2


def test_what_is_forgotten_is_not_hit_and_can_come_again() -> None:
    pool = BlockPool(6)
    cache = SourceCache(pool)
    blocks = pool.take(2)
    cache.register("a", (1,), blocks)
    cache.forget([blocks[1]])
    assert cache.lookup("a", (1,)) == []
    again = pool.take(2)
    cache.register("a", (1,), again)
    cache.register("a", (1,), blocks)  # later, and not needed
    assert cache.lookup("a", (1,)) == again
    pool.release(blocks)
    pool.release(again)
    assert pool.kept == 2


def test_unless_it_is_shared_only_the_same_request_hits() -> None:
    pool = BlockPool(6)
    cache = SourceCache(pool, shared=False)
    blocks = pool.take(2)
    cache.register("a", (1,), blocks)
    assert cache.lookup("a", (1,)) == blocks
    assert cache.lookup("b", (1,)) == []
